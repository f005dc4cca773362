"""Shards that are lost, truncated or changed during a run: errors that name them."""

import errno
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from words import SHARD_TOKENS, TOKENIZER, prepare_words

from tjx_data import DataError, TokenLoader
from tjx_data.loading import shard_reader, token_loader

DEADLINE = 120.0  # seconds before a waiting test fails


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("expected") / "set"
    prepare_words(directory)
    return directory


@pytest.fixture
def directory(expected: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(expected, tmp_path / "set"))


# Prefetches as a run does, and modifies a shard at step 50, when all pages have been read.
READER = """
import os, pathlib, sys
from tjx_data import DataError, Prefetcher, TokenLoader
directory = pathlib.Path(sys.argv[1])
loader = TokenLoader(directory, seq_len=512, batch_size=64, packing=sys.argv[2])
victim = directory / "train_00001.bin"
with Prefetcher(loader.batch, first=0) as batches:
    try:
        for step in range(1_000_000):
            batches.get(step)
            if step == 50:
                exec(sys.argv[3])
    except DataError as error:
        print(error, *error.__notes__)
        sys.exit(9)
"""


@pytest.mark.parametrize("packing", ["windows", "documents"])
@pytest.mark.parametrize(
    "fault",
    ["os.truncate(victim, 0)", "os.truncate(victim, 100_000)", "victim.unlink()"],
    ids=["emptied", "cut", "removed"],
)
def test_lost_shard_does_not_kill_the_process(directory: Path, fault: str, packing: str) -> None:
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(directory), packing, fault],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode == 9, (done.returncode, done.stderr)
    assert "train_00001.bin" in done.stdout
    assert "while step" in done.stdout


@pytest.fixture
def loader(directory: Path, monkeypatch: pytest.MonkeyPatch) -> TokenLoader:
    monkeypatch.setattr(shard_reader, "_CHECK_INTERVAL", 0.0)
    return TokenLoader(directory, seq_len=64, batch_size=16)


def flip_bit(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(10_000)
        byte = stream.read(1)[0]
        stream.seek(10_000)
        stream.write(bytes([byte ^ 1]))


def replace_by_another(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[5000:5002], content[6000:6002] = content[6000:6002], content[5000:5002]
    content[7000] ^= 1
    other = file.with_suffix(".other")
    other.write_bytes(content)
    other.rename(file)


@pytest.mark.parametrize("fault", [flip_bit, replace_by_another])
def test_changed_shard_is_rejected(
    loader: TokenLoader, directory: Path, fault: Callable[[Path], None]
) -> None:
    loader.batch(0)
    fault(directory / "train_00002.bin")
    with pytest.raises(DataError, match=r"train_00002\.bin: SHA-256"):
        loader.batch(1)


def test_restored_shard_is_read_again(loader: TokenLoader, directory: Path, expected: Path) -> None:
    reference = TokenLoader(expected, seq_len=64, batch_size=16)
    shard = directory / "train_00000.bin"
    loader.batch(0)
    shard.unlink()
    with pytest.raises(DataError, match=r"train_00000\.bin: missing"):
        loader.batch(1)
    shutil.copy(expected / shard.name, shard)
    for step in range(20):
        for name, array in reference.batch(step).items():
            np.testing.assert_array_equal(loader.batch(step)[name], array)


def test_ids_beyond_the_vocabulary_are_rejected(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "_CHECK_INTERVAL", 3600.0)  # damage without a new time stamp
    loader = TokenLoader(directory, seq_len=64, batch_size=16)
    shard = directory / "train_00001.bin"
    with shard.open("r+b") as stream:
        stream.seek(64 + 2 * 1000)
        stream.write(TOKENIZER.vocab_size.to_bytes(2, "little"))
    with pytest.raises(DataError, match=rf"train_00001\.bin: got token id {TOKENIZER.vocab_size} "):
        loader.read(SHARD_TOKENS + 990, 20)
    with pytest.raises(DataError, match=r"train_00001\.bin: got token id"):  # noqa: PT012  one is it
        for step in range(loader.rows_per_epoch // 16 + 1):
            loader.batch(step)


def test_damage_is_reported_at_the_step_that_reads_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of later steps are read with those of a step, but do not make it fail."""
    monkeypatch.setattr(shard_reader, "_CHECK_INTERVAL", 3600.0)
    monkeypatch.setattr(token_loader, "_MAX_BLOCK_SECONDS", 3600.0)
    loader = TokenLoader(directory, seq_len=64, batch_size=2)
    os.truncate(directory / "train_00001.bin", 10_000)

    def fails(read: Callable[[], object]) -> bool:
        try:
            read()
        except DataError:
            return True
        return False

    steps = range(100)
    expected = [fails(lambda: loader.rows(np.arange(2 * i, 2 * i + 2))) for i in steps]  # noqa: B023  called here
    assert [fails(lambda: loader.batch(i)) for i in steps] == expected  # noqa: B023  called here
    assert 0 < sum(expected) < 100


def test_bytes_appended_to_a_shard_are_not_read(
    directory: Path, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "_CHECK_INTERVAL", 3600.0)
    loader = TokenLoader(directory, seq_len=64, batch_size=256)
    reference = TokenLoader(expected, seq_len=64, batch_size=256)
    with (directory / "train_00001.bin").open("ab") as stream:
        stream.write(bytes(1000))
    for step in range(loader.rows_per_epoch // 256 + 1):  # some rows continue in the next shard
        np.testing.assert_array_equal(loader.batch(step)["tokens"], reference.batch(step)["tokens"])


def test_disk_failure_names_the_file(loader: TokenLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    loader.batch(0)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=r"train_0000\d\.bin: cannot be read .*Input/output error"):
        loader.batch(1)


def test_deleted_loader_closes_its_files(expected: Path) -> None:
    def count() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    loader = TokenLoader(expected, seq_len=64, batch_size=16)
    assert count() > before
    del loader
    assert count() == before
