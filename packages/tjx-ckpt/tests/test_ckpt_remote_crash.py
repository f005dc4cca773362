"""Kills at any request to an object store keep complete checkpoints."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checkpoint_place import STATE, Place, state, storage
from fsspec.implementations.memory import MemoryFileSystem

from tjx_ckpt import CorruptCheckpointWarning, SaveError, StorageError, list_steps
from tjx_ckpt.store import remote_folder


class Killed(BaseException):
    """Ends a process between two requests to the store."""


def kill_after(requests: int, patch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Allow a number of changes of the store; return whether a later one was rejected."""
    count = 0

    def counted(method: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        nonlocal count
        count += 1
        if count > requests:
            raise Killed
        return method(*arguments, **settings)

    opened = MemoryFileSystem._open

    def open_counted(self: Any, path: str, mode: str = "rb", *rest: Any, **settings: Any) -> Any:
        if mode == "rb" or path.endswith(".writer"):
            return opened(self, path, mode, *rest, **settings)
        return counted(opened, self, path, mode, *rest, **settings)

    patch.setattr(MemoryFileSystem, "_open", open_counted)
    for name in ("_rm", "cp_file"):
        method = getattr(MemoryFileSystem, name)
        patch.setattr(
            MemoryFileSystem,
            name,
            lambda *arguments, method=method: counted(method, *arguments),
        )
    return lambda: count > requests


def test_a_kill_between_any_two_requests_of_a_save_leaves_intact_checkpoints(memory: Place) -> None:
    outcomes = []
    for requests in range(100):
        MemoryFileSystem.store.clear()
        memory.save(1, 2)
        checkpointer = memory.checkpointer(keep=2)
        checkpointer.discard_after(2)  # takes the lease
        with pytest.MonkeyPatch.context() as patch:
            was_killed = kill_after(requests, patch)
            checkpointer.save(3, state(3))
            with contextlib.suppress(SaveError, Killed):
                checkpointer.close()
        if not was_killed():
            break
        with memory.checkpointer(keep=2) as after:
            after.claim()
            assert storage(memory).leftovers() == []
            steps = after.steps()
            outcomes.append(steps)
            assert [after.verify(step) for step in steps] == [[]] * len(steps)
            assert after.restore(STATE)["step"] == steps[-1]
            after.save(4, state(4))  # and the run goes on
        assert list_steps(memory.directory) == [steps[-1], 4]
    assert [1, 2] in outcomes
    assert [2, 3] in outcomes
    assert {tuple(steps) for steps in outcomes} <= {(1, 2), (1, 2, 3), (2, 3)}
    assert len(outcomes) > 10


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_kill_between_any_two_requests_of_a_rename_loses_no_byte(
    memory: Place, has_manifest: bool
) -> None:
    killed = 0
    for requests in range(100):
        MemoryFileSystem.store.clear()
        memory.save(1, 2)
        if has_manifest:
            memory.flip_bit("2/params-00000.safetensors")
        else:
            memory.remove("2/manifest.json")
        before = {name: memory.read(f"2/{name}") for name in memory.names("2")}
        checkpointer = memory.checkpointer()
        checkpointer.claim()
        with pytest.MonkeyPatch.context() as patch:
            was_killed = kill_after(requests, patch)
            try:
                with pytest.warns(CorruptCheckpointWarning):
                    checkpointer.restore(STATE)
            except Killed:
                killed += 1
        checkpointer.close()
        if not was_killed():
            break
        with memory.checkpointer() as after:
            after.claim()
            if after.steps() == [1, 2]:
                with pytest.warns(CorruptCheckpointWarning, match="using step 1 instead"):
                    assert after.restore(STATE)["step"] == 1
            assert after.steps() == [1]
            assert after.restore(STATE)["step"] == 1
            for name in storage(memory).quarantined():
                kept = {file: memory.read(f"{name}/{file}") for file in memory.names(name)}
                assert kept == before
            assert storage(memory).quarantined()
            assert storage(memory).leftovers() == []
    assert killed > 5


def test_large_files_are_uploaded_in_parts_and_failed_ones_aborted(
    s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folder, "_PART_BYTES", 5 << 20)
    large = {"w": np.random.default_rng(0).integers(0, 255, 12 << 20, dtype=np.uint8)}
    with s3.checkpointer() as checkpointer:
        checkpointer.save(1, large)
        np.testing.assert_array_equal(checkpointer.restore(large)["w"], large["w"])
        assert s3.store.info(f"{s3.root}/1/state-00000.safetensors")["ETag"].endswith('-2"')
        sent = remote_folder._RemoteWriter.__call__

        def fail_late(self: Any, data: Any) -> None:
            sent(self, data)
            if self.size > 8 << 20:
                raise ConnectionError("no answer")

        monkeypatch.setattr(remote_folder._RemoteWriter, "__call__", fail_late)
        checkpointer.save(2, large)
        with pytest.raises(SaveError, match="no answer"):
            checkpointer.wait()
        assert s3.names("2") == []
        assert s3.store.list_multipart_uploads("bucket") == []


def test_a_missing_bucket_raises(s3: Place) -> None:
    with (
        Place("s3://no-such-bucket/run").checkpointer() as checkpointer,
        pytest.raises(StorageError, match=r"no-such-bucket/run/\.writer: cannot be written"),
    ):
        checkpointer.save(1, STATE)


SAVE_FOREVER = """
import sys
import numpy as np
from tjx_ckpt import Checkpointer
from tjx_ckpt.store import remote_folder

remote_folder._PART_BYTES = 5 << 20
checkpointer = Checkpointer(sys.argv[1], keep=2)
for step in range((checkpointer.latest_step() or 0) + 1, 100_000):
    checkpointer.save(step, {"w": np.full(3 << 20, step, np.float32), "step": np.int32(step)})
    if step % 2:
        checkpointer.wait()
    print(step if step % 2 else step - 1, flush=True)
"""


def test_a_run_resumes_after_kill_9_during_an_upload(s3: Place) -> None:
    moments = random.Random(0)  # noqa: S311  moments to kill at, not secrets
    abstract = {"w": np.zeros(3 << 20, np.float32), "step": np.int32(0)}
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, s3.directory],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(moments.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        announced = int((first + process.communicate(timeout=60)[0]).split()[-1])
        # The dead owner ran on this machine, so its lease is taken over at once.
        with s3.checkpointer(period_s=3600.0, keep=2) as checkpointer:
            checkpointer.discard_after(10**6)
            latest = checkpointer.latest_step()
            assert latest is not None
            assert latest >= announced
            assert [checkpointer.verify(step) for step in checkpointer.steps()] == [[]] * len(
                checkpointer.steps()
            )
            restored = checkpointer.restore(abstract)
            assert restored["step"] == latest
            assert (restored["w"] == latest).all()
            # A request in flight can have arrived after the cleanup.
            late = storage(s3).leftovers()
            assert late in ([], [str(latest + 1)])
            checkpointer.save(latest + 1, {**abstract, "step": np.int32(latest + 1)})
            checkpointer.wait()
            assert checkpointer.verify(latest + 1) == []
            assert storage(s3).leftovers() == []
            assert checkpointer.discard_after(latest) == [latest + 1]
