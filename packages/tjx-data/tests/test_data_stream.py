"""Streams: tokens in document order, and a state from which they resume exactly."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import TokenLoader, char_tokenizer, prepare
from tjx_data.corpora.documents import Documents, assign_split
from tjx_data.loading import stream
from tjx_data.loading.base import Batch
from tjx_data.loading.stream import StreamLoader

EOT = "<|endoftext|>"
CHARACTERS = char_tokenizer(["abcdefghij 0123456789.\n"], special_tokens=(EOT,))
NO_EOT = char_tokenizer(["abcdefghij 0123456789.\n"])
TEXTS = [f"document {i} " .replace("m", "a").replace("o", "b").replace("u", "c").replace("n", "d")
         .replace("t", "e") + "abcdefghij"[i % 7 :] * (i % 4) for i in range(50)]  # fmt: skip


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK_CHARACTERS", 70)  # a few documents


class Resumable:
    """Documents with their own position, as a streaming dataset has."""

    def __init__(self, texts: list[str]):
        self.texts, self.at, self.reads = texts, 0, 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        while self.at < len(self.texts):
            self.at, self.reads = self.at + 1, self.reads + 1
            yield {"text": self.texts[self.at - 1]}

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.at = state_dict["at"]


def _loader(documents: Any = None, **changes: Any) -> StreamLoader:
    defaults: dict[str, Any] = {"seq_len": 8, "batch_size": 4, "epochs": 3}
    return StreamLoader(
        TEXTS if documents is None else documents, CHARACTERS, **{**defaults, **changes}
    )


def _batches(loader: StreamLoader) -> list[Batch]:
    found = []
    try:
        while True:
            found.append(loader.next_batch())
    except EOFError:
        return found


def _equal(one: list[Batch], other: list[Batch]) -> bool:
    if len(one) != len(other):
        return False
    pairs = list(zip(one, other, strict=True))
    return all((a[k] == b[k]).all() for a, b in pairs for k in ("tokens", "labels"))


@given(
    st.lists(st.text(st.sampled_from("abc \n"), max_size=25), min_size=1, max_size=20),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from([CHARACTERS, NO_EOT]),
)
@settings(max_examples=50)
def test_rows_are_the_stream_of_a_prepared_set(
    texts: list[str], seq_len: int, epochs: int, tokenizer: Any
) -> None:
    texts = [*texts, "a"]  # at least one document
    expected = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    for text in texts * epochs:
        if text.strip():
            expected += tokenizer.encode(text)
            expected += [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    loader = StreamLoader(texts, tokenizer, seq_len=seq_len, batch_size=1, epochs=epochs)
    batches = _batches(loader)
    n_labels = len(batches) * seq_len
    assert n_labels == (len(expected) - 1) // seq_len * seq_len
    if batches:
        tokens = np.concatenate([batch["tokens"] for batch in batches]).ravel()
        labels = np.concatenate([batch["labels"] for batch in batches]).ravel()
        assert tokens.dtype == labels.dtype == np.int32
        assert tokens.tolist() == expected[:n_labels]
        assert labels.tolist() == expected[1 : n_labels + 1]


def test_a_prepared_set_holds_the_same_tokens(tmp_path: Path) -> None:
    prepare(TEXTS, CHARACTERS, tmp_path / "set", holdout_fraction=0.2)
    prepared = TokenLoader(tmp_path / "set", seq_len=8, batch_size=1)
    training = [text for text in TEXTS if assign_split(text, 0.2) == "train"]
    batches = _batches(_loader(training, batch_size=1, epochs=1))
    tokens = np.concatenate([batch["tokens"] for batch in batches]).ravel()
    np.testing.assert_array_equal(tokens, prepared.read(0, len(tokens)))


@given(
    st.integers(0, 40),
    st.sampled_from([0, 1, 2, 7, 33, 1000]),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.integers(4, 15),
)
@settings(max_examples=15)
def test_restored_stream_returns_the_batches_that_would_have_followed(
    n_before: int, shuffle_buffer: int, epochs: int, is_resumable: bool, seq_len: int
) -> None:
    def documents() -> Any:
        return Resumable(TEXTS) if is_resumable else TEXTS

    changes = {"shuffle_buffer": shuffle_buffer, "epochs": epochs, "seq_len": seq_len, "seed": 3}
    whole = _loader(documents(), **changes)
    for _ in range(n_before):
        try:
            whole.next_batch()
        except EOFError:
            break
    state = json.loads(json.dumps(whole.state()))
    assert len(json.dumps(state)) < 1000
    expected = _batches(whole)

    fresh = _loader(documents(), **changes)
    fresh.restore(state)
    assert fresh.state() == state  # and again
    assert _equal(_batches(fresh), expected)
    whole.restore(state)  # a stream at another position
    assert _equal(_batches(whole), expected)


@pytest.mark.parametrize("shuffle_buffer", [0, 5, 64])
def test_resuming_reads_no_more_than_necessary(shuffle_buffer: int) -> None:
    texts = TEXTS * 40
    loader = _loader(Resumable(texts), shuffle_buffer=shuffle_buffer, epochs=1)
    for _ in range(300):
        loader.next_batch()
    source = Resumable(texts)
    fresh = _loader(source, shuffle_buffer=shuffle_buffer, epochs=1)
    fresh.restore(loader.state())
    n_tokens = (2 * shuffle_buffer + 1) * 8  # in memory, and what is read together
    mean = sum(map(len, TEXTS)) / len(TEXTS)
    assert source.reads <= n_tokens / mean + 20
    assert len(loader._windows) <= 2 * max(shuffle_buffer, 1) + 20
    assert len(loader._chunks) < 4 + n_tokens / 70


def test_shuffle_buffer_is_refilled_gradually() -> None:
    source = Resumable(TEXTS * 40)
    loader = _loader(source, shuffle_buffer=100)
    before = []
    for _ in range(100):  # four groups
        before.append(source.reads)
        loader.next_batch()
    assert before[1] > 30  # the first batch fills it
    assert max(np.diff(before[1:])) < 20  # no other waits for that


@pytest.mark.parametrize("buffer", [2, 10, 64])
def test_shuffling_permutes_windows_within_groups(buffer: int) -> None:
    def windows(shuffle_buffer: int, seed: int = 0) -> list[bytes]:
        texts = ["".join(chr(97 + (i * k) % 10) for i in range(50)) + str(k) for k in range(60)]
        loader = _loader(texts, batch_size=1, epochs=1, shuffle_buffer=shuffle_buffer, seed=seed)
        return [batch["tokens"].tobytes() for batch in _batches(loader)]

    plain, one, other = windows(0), windows(buffer), windows(buffer, seed=1)
    assert len(plain) > 300
    for shuffled in (one, other):
        assert shuffled != plain
        for first in range(0, len(plain), buffer):
            group = slice(first, first + buffer)
            assert sorted(shuffled[group]) == sorted(plain[group])
    assert one != other


@pytest.mark.parametrize("n", [2, 4])
def test_processes_share_the_documents(n: int) -> None:
    for i in range(n):
        loader = _loader(process_index=i, process_count=n, epochs=2)
        own = _loader(TEXTS[i::n], batch_size=4 // n, epochs=2)
        assert _equal(_batches(loader), _batches(own))
        loader, again = (_loader(process_index=i, process_count=n, epochs=2) for _ in range(2))
        for _ in range(3):
            loader.next_batch()
        again.restore(loader.state())
        assert _equal(_batches(again), _batches(loader))


def test_endless_stream_repeats() -> None:
    loader = _loader(["abc"], epochs=None, seq_len=4, batch_size=1)
    rows = [loader.next_batch()["tokens"][0].tolist() for _ in range(50)]
    eot = CHARACTERS.eot_id
    assert rows == [[eot, *CHARACTERS.encode("abc")]] * 50


def test_end_raises_eof_error() -> None:
    loader = _loader(epochs=1)
    n = len(_batches(loader))
    for _ in range(2):
        with pytest.raises(EOFError, match=f"end after {n} batches"):
            loader.next_batch()


def test_states_of_other_settings_are_rejected_with_the_differences() -> None:
    state = _loader(process_count=2).state()
    with pytest.raises(ValueError, match="with which the state was saved") as error:
        _loader(seq_len=9, shuffle_buffer=7).restore(state)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert lines[0] == "seq_len: got 9; expected 8, with which the state was saved"
    assert lines[1].startswith("process_count: got 1; expected 2")
    with pytest.raises(ValueError, match="format 'other'"):
        _loader().restore({**state, "format": "other"})
    with pytest.raises(ValueError, match="tokenizer: got"):
        StreamLoader(TEXTS, NO_EOT, seq_len=8, batch_size=4, epochs=3).restore(_loader().state())


def test_changed_documents_are_rejected() -> None:
    loader = _loader()
    for _ in range(20):
        loader.next_batch()
    changed = [text.replace("a", "b") for text in TEXTS]
    with pytest.raises(ValueError, match="documents at its position changed"):
        _loader(changed).restore(loader.state())
    with pytest.raises(ValueError, match="documents at its position changed"):
        _loader(TEXTS[:3], epochs=1).restore(
            {**loader.state(), "settings": _loader(epochs=1).settings}
        )


def test_invalid_arguments_and_documents_are_rejected() -> None:
    with pytest.raises(ValueError, match="can be read only once"):
        _loader(iter(TEXTS))
    with pytest.raises(ValueError, match="seq_len: got 0") as error:
        _loader(seq_len=0, batch_size=3, process_index=2, process_count=2, shuffle_buffer=-1,
                seed=-1, epochs=0)  # fmt: skip
    assert len(str(error.value).splitlines()) == 6
    with pytest.raises(ValueError, match="found no text in a pass over 2 documents"):
        _loader(["", " \n"], epochs=None).next_batch()
    with pytest.raises(ValueError, match="process 1 of 2 found no text in a pass over 1 doc"):
        _loader(["abc"], process_index=1, process_count=2).next_batch()
    with pytest.raises(ValueError, match="got 'text'; expected a field of document 1: content"):
        _loader([{"content": "a"}]).next_batch()
    with pytest.raises(ValueError, match="got int as document 2"):
        _loader(["a", 5]).next_batch()
    assert _loader([{"content": "abc"}], field="content", epochs=None).next_batch()


def test_documents_of_this_package_can_be_streamed() -> None:
    documents = Documents.of(lambda: TEXTS, {"corpus": "test"})
    assert _equal(_batches(_loader(documents)), _batches(_loader()))


def _json_lines(folder: Path) -> list[str]:
    files = []
    for number in range(4):
        file = folder / f"part{number}.jsonl"
        rows = [json.dumps({"text": text, "id": i}) for i, text in enumerate(TEXTS[number::4])]
        file.write_text("\n".join(rows) + "\n")
        files.append(str(file))
    return files


@pytest.mark.parametrize("kind", ["files", "table", "shuffled shards", "node"])
@pytest.mark.parametrize("shuffle_buffer", [0, 10])
def test_streaming_dataset_resumes(
    tmp_path: Path, kind: str, shuffle_buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def dataset() -> Any:
        if kind == "table":
            return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=5)
        found = datasets.load_dataset(
            "json", data_files=_json_lines(tmp_path), split="train", streaming=True
        )
        if kind == "shuffled shards":  # and no buffer of rows
            found = found.shuffle(seed=1, buffer_size=1)
        if kind == "node":
            split = importlib.import_module("datasets.distributed").split_dataset_by_node
            found = split(found, rank=1, world_size=2)
        return found

    def loader(source: Any) -> StreamLoader:
        return _loader(source, epochs=3, shuffle_buffer=shuffle_buffer, batch_size=3)

    whole = loader(dataset())
    batches, states = [], [whole.state()]
    for batch in iter(lambda: _next(whole), None):
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.state())))
    n = len(batches) // 3  # about as many come from each pass
    assert n > 10
    for step in (0, 1, n // 2, n, n + 7, 2 * n + 3, len(batches)):
        read_before = dataset()
        next(iter(read_before))
        fresh = loader(read_before)
        fresh.restore(states[step])
        assert _equal(_batches(fresh), batches[step:]), step


def test_each_pass_of_a_dataset_has_all_its_documents(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(50))})
    streaming = dataset.to_iterable_dataset(num_shards=5)
    streaming.set_epoch(2)
    assert len(list(streaming)) == 50  # it was read before
    stream = StreamLoader(streaming, CHARACTERS, seq_len=1, batch_size=1, epochs=3)
    tokens = [int(batch["tokens"][0, 0]) for batch in _batches(stream)]
    texts = CHARACTERS.decode(tokens).split(EOT)[1:]
    assert texts[:50] == TEXTS
    assert texts[50:100] != TEXTS  # the shards come in another order
    assert sorted(texts[50:100]) == sorted(texts[100:150]) == sorted(TEXTS)
    with pytest.raises(ValueError, match="content"):
        StreamLoader(streaming, CHARACTERS, seq_len=1, batch_size=1, field="content")


def _next(loader: StreamLoader) -> Batch | None:
    try:
        return loader.next_batch()
    except EOFError:
        return None
