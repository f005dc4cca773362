"""Leases: one holder, takeover after missing renewals, detection of losses."""

import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkpoint_place import STATE, Place
from fsspec.implementations.local import LocalFileSystem

from tjx_ckpt import DirectoryInUseError, SaveError
from tjx_ckpt.store.lease import Lease

# As in checkpoint_place: the holder renews fast, others watch for long.
FAST, PATIENT, FOREVER = 0.02, 5.0, 3600.0
ELSEWHERE = {"process": 9, "host": "other", "machine": "another", "token": "x", "count": 1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".writer"


class Store(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Local files as an object store for several processes, with atomic writes."""

    cachable = False

    def __init__(self, at_read: Callable[[int], object] | None = None) -> None:
        super().__init__()
        self.at_read, self.reads, self.is_down = at_read, 0, threading.Event()
        self.rejected = threading.Event()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite") -> None:
        if self.is_down.is_set():
            self.rejected.set()
            raise ConnectionError("no answer")
        written = Path(f"{path}.{uuid.uuid4()}")
        written.write_bytes(value)
        if mode == "overwrite":
            written.replace(path)
            return
        try:
            Path(path).hardlink_to(written)
        finally:
            written.unlink()

    def cat_file(self, path: str, **settings: Any) -> bytes:
        self.reads += 1
        if self.at_read is not None:
            self.at_read(self.reads)
        content: bytes = super().cat_file(path, **settings)
        return content


def lease(path: Path, *, period_s: float = FAST, store: Store | None = None) -> Lease:
    return Lease(store or Store(), str(path), period_s=period_s)


def test_one_of_many_acquires_the_lease_and_the_next_after_its_release(path: Path) -> None:
    leases = [lease(path, period_s=FAST if n == 0 else PATIENT) for n in range(8)]
    assert leases[0].acquire()
    assert leases[0].acquire()  # ours already
    with ThreadPoolExecutor(7) as pool:
        assert list(pool.map(Lease.acquire, leases[1:])) == [False] * 7
    assert leases[1].owner() == leases[0].owner()
    leases[0].release()
    assert not path.exists()
    all_found_none = threading.Barrier(7)

    def wait_before_it_is_made(reads: int) -> None:
        if reads == 2:
            all_found_none.wait(30)

    racing = [lease(path, period_s=FOREVER, store=Store(wait_before_it_is_made)) for _ in range(7)]
    with ThreadPoolExecutor(7) as pool:
        got = list(pool.map(Lease.acquire, racing))
    assert got.count(True) == 1
    racing[got.index(True)].confirm()
    racing[got.index(True)].release()


def test_a_lease_without_renewals_is_taken_over(path: Path) -> None:
    slept = lease(path, period_s=FOREVER)  # as after a night with the lid closed
    assert slept.acquire()
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps({**content, "machine": "another"}))
    other = lease(path)
    assert other.acquire()
    other.confirm()
    with pytest.raises(DirectoryInUseError, match=r"process \d+ on .* took over"):
        slept.confirm()
    assert not slept.held
    assert not slept.acquire()
    slept.release()
    assert not slept.acquire()  # for good
    other.confirm()
    other.release()


def test_the_renewing_thread_detects_a_loss(path: Path) -> None:
    ours = lease(path)
    assert ours.acquire()
    path.write_text(json.dumps(ELSEWHERE))
    assert ours._thread is not None
    ours._thread.join(30)
    assert not ours.held
    assert not ours.acquire()
    ours.release()
    assert json.loads(path.read_bytes()) == ELSEWHERE


DIE_WITH_IT = """
import os, sys
from fsspec.implementations.local import LocalFileSystem
from tjx_ckpt.store.lease import Lease
assert Lease(LocalFileSystem(), sys.argv[1]).acquire()
os._exit(0)
"""


def test_the_lease_of_a_dead_local_process_is_taken_over_at_once(path: Path) -> None:
    subprocess.run([sys.executable, "-c", DIE_WITH_IT, str(path)], check=True, timeout=60)
    dead = json.loads(path.read_bytes())
    ours = lease(path, period_s=FOREVER)
    assert dead["host"] in ours.owner()
    assert ours.acquire()
    ours.release()


@pytest.mark.parametrize("change", [{"machine": "another"}, {"machine": ""}, {"process": 0}])
def test_the_lease_of_an_unknown_process_is_watched(
    path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-c", DIE_WITH_IT, str(path)], check=True, timeout=60)
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    if change == {"machine": ""}:
        monkeypatch.setattr("tjx_ckpt.store.lease._machine", lambda: "")

    def live(reads: int) -> None:
        if reads == 4:
            path.write_text(json.dumps({**ELSEWHERE, "count": 2}))

    store = Store(live)
    assert not lease(path, period_s=PATIENT / 2, store=store).acquire()
    assert store.reads >= 4


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"process": "x"}'])
def test_a_damaged_lease_is_taken_over_too(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    ours = lease(path)
    assert "process" in ours.owner()
    assert ours.acquire()
    ours.release()


def test_a_lease_that_is_released_while_watched_is_acquired(path: Path) -> None:
    first = lease(path, period_s=FOREVER)
    assert first.acquire()
    freeing = Store(lambda reads: first.release() if reads == 2 else None)
    second = lease(path, period_s=PATIENT, store=freeing)
    assert second.acquire()
    second.release()


def test_temporary_store_errors_do_not_lose_the_lease(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    ours = lease(path, store=store)
    assert ours.acquire()
    store.is_down.set()
    assert store.rejected.wait(30)
    before = path.read_bytes()
    store.is_down.clear()
    patient = lease(path, period_s=PATIENT)
    assert not patient.acquire()  # it is renewed again
    assert path.read_bytes() != before
    ours.confirm()
    ours.release()
    assert "not renewed (ConnectionError: no answer)" in caplog.text


def test_saves_fail_after_the_loss_of_the_lease(memory: Place) -> None:
    with memory.checkpointer(period_s=3600.0) as checkpointer:
        checkpointer.save(1, STATE)
        checkpointer.wait()
        memory.write(".writer", b'{"process": 9, "host": "other", "token": "x"}')
        checkpointer.save(2, STATE)
        with pytest.raises(SaveError, match="process 9 on other took over"):
            checkpointer.wait()
        with pytest.raises(DirectoryInUseError, match="process 9 on other is saving into memory"):
            checkpointer.save(2, STATE)
    assert memory.names("2") == []
    assert b"other" in memory.read(".writer")  # not ours to free
