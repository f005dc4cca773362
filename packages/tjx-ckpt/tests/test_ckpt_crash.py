"""Killed, failed and concurrent saves keep earlier checkpoints."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tjx_ckpt import Checkpointer, DirectoryInUseError, SaveError
from tjx_ckpt.store.local_folder import LocalFolder

STATE = {"a": np.zeros(3, np.float32)}

SAVE_FOREVER = """
import sys
import numpy as np
from tjx_ckpt import Checkpointer

checkpointer = Checkpointer(sys.argv[1], keep=2)
for step in range(1, 100_000):
    checkpointer.save(step, {"w": np.full((64, 64), step), "step": np.int32(step)})
    if step % 3 == 0:
        checkpointer.wait()
        print(step, flush=True)
"""


def kill_a_saving_process(directory: Path, after_s: float) -> int:
    """Return the last step that the process reported as saved."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(after_s)
    process.send_signal(signal.SIGKILL)
    rest = process.communicate(timeout=30)[0]
    return int((first + rest).split()[-1])


def test_a_run_resumes_after_kill_9_at_any_moment(tmp_path: Path) -> None:
    moments = random.Random(0)  # noqa: S311  moments to kill at, not secrets
    abstract = {"w": np.zeros((64, 64), np.int64), "step": np.int32(0)}
    for _ in range(3):
        announced = kill_a_saving_process(tmp_path, moments.uniform(0, 0.4))
        with Checkpointer(tmp_path, keep=2) as checkpointer:
            checkpointer.claim()
            assert not LocalFolder(tmp_path).leftovers()
            latest = checkpointer.latest_step()
            assert latest is not None
            assert latest >= announced
            for step in checkpointer.steps():
                assert checkpointer.verify(step) == []
            restored = checkpointer.restore(abstract)
            assert restored["step"] == latest
            np.testing.assert_array_equal(restored["w"], np.full((64, 64), latest))
        for step in checkpointer.steps():  # the next round counts from 1 again
            LocalFolder(tmp_path).discard(step)


def test_leftovers_are_not_listed_and_deleted_by_claim(tmp_path: Path) -> None:
    for name in ("7.tmp", "6.discarded.tmp", "8.corrupt", "notes", "007"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    before = {path.name for path in tmp_path.iterdir()}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        assert {path.name for path in tmp_path.iterdir()} == before  # reading changes nothing
        checkpointer.claim()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".writer", "007", "8.corrupt", "notes"}


def test_two_runs_cannot_save_into_one_directory(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as first:
        first.save(1, STATE)
        first.wait()
        alive = tmp_path / "2.tmp"
        alive.mkdir()  # as the first run's next save
        with Checkpointer(tmp_path) as second:
            assert alive.exists()
            with pytest.raises(DirectoryInUseError, match=r"process \d+ on"):
                second.save(2, STATE)
    with Checkpointer(tmp_path) as second:
        second.save(2, STATE)


def test_everything_is_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure only flushed data remain, so the order of flushes matters."""
    flushed: set[int] = set()
    at_rename: set[int] = set()
    really_fsync, really_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        really_fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def rename(path: Path, target: Path) -> Path:
        renamed = really_rename(path, target)
        at_rename.update(flushed)
        flushed.clear()
        return renamed

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": STATE, "step": np.int32(1)})
    folder = tmp_path / "1"
    assert {path.stat().st_ino for path in (folder, *folder.iterdir())} <= at_rename
    assert tmp_path.stat().st_ino in flushed


@pytest.mark.parametrize("failing", ["begin", "create", "read_new", "commit"])
def test_a_background_error_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def disk_full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, STATE)
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(LocalFolder, failing, disk_full)
            checkpointer.save(2, STATE)
            with pytest.raises(SaveError, match=r"step 2 failed: OSError.*No space left") as caught:
                checkpointer.save(3, STATE)
        assert caught.value.step == 2
        assert not LocalFolder(tmp_path).leftovers()
        assert checkpointer.steps() == [1]
        assert checkpointer.last_save is not None
        assert checkpointer.last_save.step == 1
        checkpointer.save(3, STATE)  # the error was told once; the next save works
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3]


def check_until_it_raises(checkpointer: Checkpointer) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        checkpointer.check()


def test_check_raises_after_a_failed_save_and_never_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def wait_and_fail(*_arguments: object) -> None:
        go_on.wait(30)
        raise OSError("gone")

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.check()
        monkeypatch.setattr(LocalFolder, "commit", wait_and_fail)
        checkpointer.save(1, STATE)
        checkpointer.check()  # the save hangs: nothing to tell yet
        go_on.set()
        with pytest.raises(SaveError, match="gone"):
            check_until_it_raises(checkpointer)
        checkpointer.check()  # told once


def test_close_raises_the_error_of_the_last_save_and_unlocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "commit", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        checkpointer.save(2, STATE)
        with pytest.raises(SaveError, match="gone"):
            checkpointer.close()
    with Checkpointer(tmp_path) as other:
        other.save(1, STATE)


def test_saving_and_restoring_print_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, STATE)
        checkpointer.restore(STATE)
    assert capfd.readouterr() == ("", "")
