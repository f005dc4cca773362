"""Streams in training: rows by index, exact after a kill, disjoint over processes, with retries."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tjx_data import (
    DataConfig,
    DataError,
    Documents,
    StreamRows,
    TokenLoader,
    byte_tokenizer,
    open_sets,
    open_stream,
)  # fmt: skip
from tjx_data.corpora import documents as documents_module
from tjx_data.corpora.documents import InMemoryPart, assign_split
from tjx_data.loading import document_stream, stream, stream_rows
from tjx_data.loading.document_stream import DocumentSource

TOKENIZER = byte_tokenizer()
TEXTS = [f"document {n} " + "abcdefgh"[n % 8] * (n % 23) for n in range(120)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK_CHARACTERS", 90)
    monkeypatch.setattr(documents_module, "PART_CHARACTERS", 100)
    monkeypatch.setattr(stream_rows, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(document_stream, "RETRY_SECONDS", (0.0, 0.0, 0.0))


def write_sources(folder: Path) -> str:
    """Write two sources; return their mixture."""
    (folder / "a.txt").write_text("<|endoftext|>".join(TEXTS))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": t[::-1]}) + "\n" for t in TEXTS))
    return f"{folder}/a.txt=0.7,{folder}/b.jsonl=0.3"


def opened(folder: Path, process_index: int = 0, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "mixture": write_sources(folder), "tokenizer": "byte", "seq_len": 12, "stream": True,
        "shuffle_buffer": 7, "cache_dir": str(folder / "cache"),
        "curriculum": f"20:{folder}/b.jsonl=1;40:{folder}/a.txt=1,{folder}/b.jsonl=1", **changes,
    }  # fmt: skip
    count = settings.pop("process_count", 1)
    return open_stream(
        DataConfig(**settings), TOKENIZER, batch_size=4, seed=5,
        process_index=process_index, process_count=count,
    )  # fmt: skip


def tokens(loader: Any, steps: range) -> list[list[list[int]]]:
    return [loader.batch(step)["tokens"].tolist() for step in steps]


@pytest.mark.parametrize("process_count", [1, 2])
def test_any_step_is_the_same_with_and_without_recorded_states(
    tmp_path: Path, process_count: int
) -> None:
    for process in range(process_count):
        choices = {"process_index": process, "process_count": process_count}
        expected = tokens(opened(tmp_path, **choices), range(60))
        for first in (59, 31, 1, 0, 44):  # back and forth, from the index file of the loader above
            again = opened(tmp_path, **choices)
            assert tokens(again, range(first, 60)) == expected[first:]
            assert tokens(again, range(3, 9)) == expected[3:9]
        for file in (tmp_path / "cache" / "streams").iterdir():
            file.unlink()
        assert tokens(opened(tmp_path, **choices), range(30, 60)) == expected[30:]


def test_resuming_reads_from_a_recorded_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(opened(tmp_path), range(60))
    read: list[int] = []
    original = stream.StreamLoader._tokenize

    def count(self: Any, texts: list[str], **others: Any) -> Any:
        read.append(len(texts))
        return original(self, texts, **others)

    monkeypatch.setattr(stream.StreamLoader, "_tokenize", count)
    assert tokens(opened(tmp_path), range(59, 60)) == expected[59:]
    resumed = sum(read)
    read.clear()
    for file in (tmp_path / "cache" / "streams").iterdir():
        file.write_bytes(b"{")  # a damaged index is not used
    assert tokens(opened(tmp_path), range(59, 60)) == expected[59:]
    assert resumed < sum(read) / 3


def test_recorded_states_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_rows, "MAX_STATES", 8)
    expected = tokens(opened(tmp_path), range(100))
    for file in (tmp_path / "cache" / "streams").iterdir():
        rows = [row for row, _ in json.loads(file.read_bytes())["states"]]
        assert 4 <= len(rows) <= 8
        assert rows[-1] - rows[-2] < rows[1] - rows[0]  # dense near the end
    for first in (3, 50, 98):
        assert tokens(opened(tmp_path), range(first, first + 2)) == expected[first : first + 2]


def test_processes_read_disjoint_training_documents_only(tmp_path: Path) -> None:
    path = f"{tmp_path}/a.txt"
    config = {"mixture": None, "curriculum": None, "path": path, "shuffle_buffer": 0}
    found: list[set[str]] = []
    for process in range(2):
        loader = opened(tmp_path, process, process_count=2, **config)
        ids = np.concatenate([loader.batch(step)["tokens"].ravel() for step in range(70)])
        documents = "".join(
            "|" if token == TOKENIZER.eot_id else chr(token) for token in ids
        ).split("|")  # fmt: skip
        found.append(set(documents[1:-1]) - {""})
    assert not found[0] & found[1]
    training = {text for text in TEXTS if assign_split(text, 0.1) == "train"}
    assert found[0] | found[1] == training != set(TEXTS)


def test_sample_prepares_only_the_start_and_its_held_out_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tjx_data.config.STREAM_SAMPLE_TOKENS", 400)
    write_sources(tmp_path)
    config = DataConfig(
        path=f"{tmp_path}/a.txt", tokenizer="byte", stream=True, cache_dir=str(tmp_path / "cache")
    )
    (folder,) = open_sets(config.stream_sample).values()
    assert 399 <= TokenLoader(folder, seq_len=4, batch_size=1).n_tokens <= 400
    held_out = TokenLoader(folder, split="validation", seq_len=4, batch_size=1)
    for number in range(held_out.n_documents):
        assert assign_split(TOKENIZER.decode(held_out.document(number)), 0.1) == "validation"


def test_stream_leaves_out_what_the_sample_holds_out_of_a_few_files(tmp_path: Path) -> None:
    training = [text for text in TEXTS if assign_split(text, 0.1) == "train"][:12]
    for number, text in enumerate(training):
        (tmp_path / f"{number}.txt").write_text(text)
    config = DataConfig(
        path=f"{tmp_path}/*.txt", tokenizer="byte", stream=True, seq_len=8, shuffle_buffer=1,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    (folder,) = open_sets(config.stream_sample).values()
    sample = TokenLoader(folder, split="validation", seq_len=4, batch_size=1)
    held_out = TOKENIZER.decode(sample.document(0))
    assert sample.n_documents == 1
    assert held_out in training
    stream = open_stream(config, TOKENIZER, batch_size=1, seed=0)
    read = TOKENIZER.decode(np.concatenate([stream.batch(n)["tokens"][0] for n in range(200)]))
    assert held_out not in read
    assert all(text in read for text in training if text != held_out)


class Flaky:
    """Documents whose reading fails at some positions, some times each."""

    def __init__(self, failures: dict[int, int]) -> None:
        self.failures, self.passes = failures, 0

    def parts(self) -> Iterator[InMemoryPart]:
        self.passes += 1
        for number, text in enumerate(TEXTS):
            if self.failures.get(number, 0) > 0:
                self.failures[number] -= 1
                raise ConnectionError(f"lost at {number}")
            yield InMemoryPart((text, ""))


def flaky_rows(folder: Path, failures: dict[int, int]) -> StreamRows:
    flaky = Flaky(failures)
    source = DocumentSource(Documents({}, flaky.parts), "flaky", keep=lambda text: text != "x")
    return StreamRows(
        source, TOKENIZER, source={"corpus": "flaky"}, seq_len=12, batch_size=4, seed=0,
        process_index=0, process_count=1, shuffle_buffer=5, index_dir=folder,
    )  # fmt: skip


def test_reading_is_retried_without_losing_or_repeating_documents(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tokens(flaky_rows(tmp_path / "a", {}), range(80))
    rows = flaky_rows(tmp_path / "b", {3: 2, 4: 3, 60: 1, 119: 3})
    with caplog.at_level(logging.WARNING):
        assert tokens(rows, range(80)) == expected
    assert "stream of flaky: lost at 3; retry 2 of 3 in 0 s" in caplog.text
    assert rows.source.status == "reading"


def test_source_that_stays_broken_is_a_named_state_and_a_data_error(tmp_path: Path) -> None:
    rows = flaky_rows(tmp_path, {40: 4})
    with pytest.raises(DataError, match=r"flaky: reading failed 4 times.*lost at 40"):
        tokens(rows, range(80))
    assert rows.source.status == "failed"


def test_slow_source_is_logged_while_it_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(document_stream, "SLOW_SECONDS", 0.02)
    statuses = []

    def parts() -> Iterator[InMemoryPart]:
        for _ in range(500):  # until the other thread has noticed
            statuses.append(source.status)
            if source.status == "slow":
                break
            time.sleep(0.01)
        yield InMemoryPart(("text",))

    source = DocumentSource(Documents({}, parts), "slow one", keep=bool)
    with caplog.at_level(logging.WARNING):
        assert list(source) == ["text"]
    assert statuses[-1] == "slow"
    assert "stream of slow one: no document for" in caplog.text
    assert source.status == "reading"


def test_changed_documents_are_refused_not_read_silently(tmp_path: Path) -> None:
    rows = flaky_rows(tmp_path, {})
    tokens(rows, range(60))
    changed = [*TEXTS[:30], "another", *TEXTS[31:]]
    other = flaky_rows(tmp_path, {})
    other.source._documents = Documents({}, lambda: (InMemoryPart((t, "")) for t in changed))
    file = next(tmp_path.glob("*.json"))
    states = json.loads(file.read_bytes())["states"]
    row = next(row for row, state in states if state["place"]["source"]["part"] >= 25)
    with pytest.raises(DataError, match=f"the documents before row {row} changed"):
        other.batch(row // 4)


CHILD = """
import sys
from pathlib import Path
import test_data_stream_rows as t
from tjx_data.loading import stream, stream_rows
stream.CHUNK_CHARACTERS, stream_rows.SAVE_SECONDS = 90, 0.0
folder, first, process = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
loader = t.opened(folder, process, process_count=2)
for step in range(first, 200):
    print(step, t.tokens(loader, range(step, step + 1))[0], flush=True)
"""


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_processes_continue_with_the_same_batches(tmp_path: Path, kills: int) -> None:
    for process in range(2):
        expected = tokens(opened(tmp_path, process, process_count=2), range(200))
        for file in (tmp_path / "cache" / "streams").iterdir():
            file.unlink()
        draws = np.random.default_rng(process)
        for kill in range(kills):
            first = int(draws.integers(0, 150)) if kill else 0
            n_lines = int(draws.integers(1, 50))
            path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
            with subprocess.Popen(
                [sys.executable, "-c", CHILD, str(tmp_path), str(first), str(process)],
                stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
            ) as child:  # fmt: skip
                assert child.stdout is not None
                for _ in range(n_lines):
                    step, batch = child.stdout.readline().split(" ", 1)
                    assert json.loads(batch) == expected[int(step)]
                child.send_signal(signal.SIGKILL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": "documents"}, "packing: got documents with stream"),
        ({"windows": "random"}, "windows: got random with stream"),
        ({"max_tokens": 99}, "max_tokens: got 99 with stream"),
        ({"holdout": "tail"}, "holdout: got 'tail' with stream"),
        ({"path": "train.bin"}, r"stream: got 'train\.bin', token ids"),
        ({"shuffle_buffer": -1}, "shuffle_buffer: got -1"),
    ],
)
def test_settings_that_need_a_prepared_set_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(stream=True, **changes)


def test_order_depends_on_seed_buffer_and_processes_and_identity_says_so(tmp_path: Path) -> None:
    identities = [
        opened(tmp_path).fingerprint,
        opened(tmp_path, shuffle_buffer=8).fingerprint,
        opened(tmp_path, process_count=2).fingerprint,
        opened(tmp_path, subset=0.5).fingerprint,
        opened(tmp_path, holdout_fraction=0.2).fingerprint,
    ]
    assert len(set(identities)) == 5
    assert opened(tmp_path, 1, process_count=2).fingerprint == identities[2]
