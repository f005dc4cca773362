"""Fault tolerance of preparation: kills, damage, other executors."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import words
from words import SHARD_TOKENS, TOKENIZER, corpus, prepare_words

from tjx_data import TokenLoader, char_tokenizer, prepare
from tjx_data.prepared.index import shard_header
from tjx_data.prepared.tokenize_parts import PartRecord, PartTask, tokenize_part


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare the set without interruption, in this process."""
    directory = tmp_path_factory.mktemp("expected") / "set"
    prepare_words(directory)
    return directory


@pytest.mark.parametrize("wanted", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_preparation_resumes_after_kills_at_any_moment(
    expected: Path, tmp_path: Path, wanted: int
) -> None:
    out, errors = tmp_path / "set", tmp_path / "errors"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(how: str, seconds: float | None) -> int:
        """Prepare for a limited time in seconds; return the exit code."""
        command = [sys.executable, words.__file__, str(out), how]
        with errors.open("w") as stream:
            process = subprocess.Popen(command, env=environment, stderr=stream)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return process.wait()

    seconds = {}
    for how in ("processes", "here"):
        began = time.monotonic()
        assert run(how, None) == 0, errors.read_text()
        seconds[how] = time.monotonic() - began
        assert _contents(out) == _contents(expected)
        shutil.rmtree(out)

    moments, kills, kept = random.Random(1), 0, 0  # noqa: S311  moments, not secrets
    while kills < wanted or kept == 0:  # some kills must hit unfinished parts
        how = "here" if kills % 4 else "processes"
        status = run(how, moments.uniform(0.3, 1.0) * seconds[how])
        kept += len(list(tmp_path.glob(".set.work/part_*.npz")))
        if status == 0:
            assert out.exists()
        else:
            assert status == -signal.SIGKILL, errors.read_text()
            kills += 1
        if out.exists():  # it finished before the kill: start over
            assert _contents(out) == _contents(expected)
            shutil.rmtree(out)
    assert run("processes", None) == 0, errors.read_text()
    assert _contents(out) == _contents(expected)
    assert not (tmp_path / ".set.work").exists()


def test_kill_during_cleanup_leaves_nothing_to_resume(expected: Path, tmp_path: Path) -> None:
    class KilledError(Exception):
        """Simulates the end of the process."""

    def delete_some(folder: Path, ignore_errors: bool = False) -> None:
        if ignore_errors:  # of an unfinished set
            return
        (folder / "tokenizer.json").unlink()
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tjx_data.prepared.prepare.shutil.rmtree", delete_some)
        with pytest.raises(KilledError):
            prepare_words(tmp_path / "set")
    assert _contents(tmp_path / "set") == _contents(expected)
    # Prepare the same set again with the leftovers present.
    shutil.rmtree(tmp_path / "set")
    prepare_words(tmp_path / "set")
    assert _contents(tmp_path / "set") == _contents(expected)
    assert not (tmp_path / ".set.work").exists()


def test_dask_cluster_gives_the_same_bytes(expected: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        executor = client.get_executor()
        prepare(corpus(), TOKENIZER, tmp_path / "set", shard_tokens=SHARD_TOKENS, executor=executor)
    assert _contents(tmp_path / "set") == _contents(expected)


def test_finished_parts_are_not_repeated(expected: Path, tmp_path: Path) -> None:
    texts = [*corpus()]
    reads: list[int] = []

    class StoppedError(Exception):
        """Simulates an interruption."""

    def stop_late(stage: object) -> None:
        reads.append(1)
        if len(reads) == 3:
            raise StoppedError

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as one:
        patch.setattr("tjx_data.corpora.documents.PART_CHARACTERS", 200_000)
        with pytest.raises(StoppedError):
            prepare(
                texts, TOKENIZER, tmp_path / "set", executor=one, in_flight=1, progress=stop_late
            )
        made = sorted((tmp_path / ".set.work").glob("part_*.npz"))
        assert len(made) >= 3
        stamps = {file.name: file.stat().st_mtime_ns for file in made}
        tokenized: list[Path] = []

        def spy(task: PartTask) -> PartRecord:
            tokenized.append(task.file)
            return tokenize_part(task)

        patch.setattr("tjx_data.prepared.prepare.tokenize_part", spy)
        prepare(texts, TOKENIZER, tmp_path / "set", executor=one)
        assert tokenized
        assert not {file.name for file in tokenized} & set(stamps)
    loader = TokenLoader(tmp_path / "set", seq_len=8, batch_size=1)
    reference = TokenLoader(expected, seq_len=8, batch_size=1)
    np.testing.assert_array_equal(
        loader.read(0, loader.n_tokens), reference.read(0, reference.n_tokens)
    )


def test_finished_parts_of_other_documents_are_not_used(tmp_path: Path) -> None:
    texts = [*corpus()]
    others = [text.replace("a", "b") for text in texts]
    work = tmp_path / ".set.work"
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as one:
        patch.setattr("tjx_data.corpora.documents.PART_CHARACTERS", 200_000)
        patch.setattr(
            "tjx_data.prepared.prepare.assemble", lambda *_: pytest.fail("stopped before it")
        )
        with pytest.raises(pytest.fail.Exception):
            prepare(texts, TOKENIZER, tmp_path / "set", executor=one)
        patch.undo()
        patch.setattr("tjx_data.corpora.documents.PART_CHARACTERS", 200_000)
        assert len(list(work.glob("part_*.npz"))) > 3
        next(work.glob("part_*.npz")).write_bytes(b"cut short")
        prepare(others, TOKENIZER, tmp_path / "set", executor=one)
        prepare(others, TOKENIZER, tmp_path / "expected", executor=one)
    assert _contents(tmp_path / "set") == _contents(tmp_path / "expected")


def test_shard_of_another_tokenizer_is_rejected_without_reading_it(
    expected: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(expected, tmp_path / "set")
    shard = directory / "train_00001.bin"
    content = shard.read_bytes()
    other = char_tokenizer(["abcd"])
    header = shard_header(
        token_bytes=2, first_token=SHARD_TOKENS, tokenizer_fingerprint=other.fingerprint
    )
    shard.write_bytes(header + content[64:])
    with pytest.raises(ValueError, match=rf"train_00001\.bin: .*{other.fingerprint[:16]}"):
        TokenLoader(directory, seq_len=8, batch_size=2)
    (directory / "train_00000.bin").rename(shard)
    with pytest.raises(ValueError, match=r"train_00000\.bin: missing"):
        TokenLoader(directory, seq_len=8, batch_size=2)
    shutil.copy(shard, directory / "train_00000.bin")
    with pytest.raises(ValueError, match=r"train_00001\.bin: belongs to another position"):
        TokenLoader(directory, seq_len=8, batch_size=2)


@pytest.mark.parametrize("how", ["vanishes", "shrinks"])
def test_shard_lost_during_training_is_named(
    expected: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tjx_data.loading.shard_reader._CHECK_INTERVAL", 0.02)
    directory = shutil.copytree(expected, tmp_path / "set")
    loader = TokenLoader(directory, seq_len=8, batch_size=2)
    loader.batch(0)
    shard = directory / "train_00002.bin"
    if how == "vanishes":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train_00002\.bin: (missing|got)"):  # noqa: PT012
        for step in range(1, 200):
            loader.batch(step)
            time.sleep(0.005)
