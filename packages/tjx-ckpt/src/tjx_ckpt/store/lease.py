"""Writer lock for object stores: a lease object that its holder renews periodically.

Clocks of different machines are never compared. A process that finds a lease watches it: if the
lease changes, its holder is alive; if it is unchanged for two periods, the process takes it over. A
dead holder on the same machine is recognized immediately.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from tjx_ckpt.errors import DirectoryInUseError, StorageError

_log = logging.getLogger(__name__)
_CHECKS_PER_PERIOD = 10


class Lease:
    """A lock on a directory of an object store; implements `tjx_ckpt.store.storage.Lock`.

    A holder that was suspended for too long can lose the lease to another process, permanently:
    `acquire` then returns False and `confirm` raises.

    Parameters
    ----------
    store
        The fsspec file system.
    path
        Path of the lease object, which names its owner.
    period_s
        Seconds between two renewals.
    """

    def __init__(self, store: Any, path: str, *, period_s: float = 10.0) -> None:
        self._store, self._path, self._period_s = store, path, period_s
        self._token = uuid.uuid4().hex
        self._count = 0
        self._lost = False
        self._thread: threading.Thread | None = None
        self._released = threading.Event()

    @property
    def held(self) -> bool:
        """Whether this object holds the lease, as of the last renewal."""
        return self._thread is not None and not self._lost

    def acquire(self) -> bool:
        """Acquire the lease if it is free, abandoned or already held by this object.

        Returns
        -------
        bool
            False if another process holds it or has taken it over.

        Raises
        ------
        StorageError
            If the store cannot be written.
        PermissionError
            If this process may not write there.
        """
        if self._thread is not None or self._lost:
            return self.held
        found = self._read()
        if found is not None and not self._is_abandoned(found):
            return False
        if not self._claim(found):
            return False
        self._released.clear()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return True

    def confirm(self) -> None:
        """Check that this object still holds the lease.

        Raises
        ------
        DirectoryInUseError
            If another process has taken it over.
        """
        if not (self.held and self._is_own()):
            self._lost = True
            raise DirectoryInUseError(
                f"{self.owner()} took over {self._path}: this process did not renew it in time"
            )

    def owner(self) -> str:
        """Return the last process that acquired the lease, as "process 123 on host"."""
        content = _parse(self._read())
        if not content:
            return "another process"
        return f"process {content.get('process')} on {content.get('host')}"

    def holder(self) -> str | None:
        """Return the process that seems to hold the lease, or None."""
        found = self._read()
        return None if found is None or _holder_is_dead(found) else self.owner()

    def release(self) -> None:
        """Release the lease if this object holds it."""
        if self._thread is None:
            return
        self._released.set()
        self._thread.join()
        self._thread = None
        if not self._lost and self._is_own():
            self._store.rm_file(self._path)

    def _claim(self, found: bytes | None) -> bool:
        """Create the lease or overwrite an abandoned one; the last writer holds it."""
        now = self._read()
        if now is None:
            try:
                self._store.pipe_file(self._path, self._content(), mode="create")
            except PermissionError:
                raise
            except OSError as error:
                # Another process was first, or a retried request found its own first attempt.
                if self._read() is None:
                    raise StorageError(f"{self._path}: cannot be written ({error})") from error
        elif now == found:
            self._store.pipe_file(self._path, self._content())
        return self._is_own()

    def _is_abandoned(self, found: bytes) -> bool:
        if _holder_is_dead(found):
            return True
        end = time.monotonic() + 2 * self._period_s
        while time.monotonic() < end:
            time.sleep(self._period_s / _CHECKS_PER_PERIOD)
            now = self._read()
            if now != found:
                return now is None
        return True

    def _renew(self) -> None:
        """Renew the lease until it is released or lost; runs in a thread."""
        while not self._released.wait(self._period_s):
            try:
                if not self._is_own():
                    self._lost = True
                    _log.error("%s: %s took it over", self._path, self.owner())
                    return
                self._store.pipe_file(self._path, self._content())
            except (
                Exception
            ) as error:  # the next renewal can succeed; other processes wait for two periods
                _log.warning("%s: not renewed (%s: %s)", self._path, type(error).__name__, error)

    def _is_own(self) -> bool:
        return _parse(self._read()).get("token") == self._token

    def _content(self) -> bytes:
        self._count += 1
        return json.dumps({
            "process": os.getpid(),
            "host": socket.gethostname(),
            "machine": _machine(),
            "token": self._token,
            "count": self._count,
        }).encode()  # fmt: skip

    def _read(self) -> bytes | None:
        try:
            return bytes(self._store.cat_file(self._path))
        except FileNotFoundError:
            return None


def _parse(content: bytes | None) -> dict[str, Any]:
    """Return the content of a lease; empty if it cannot be parsed."""
    try:
        parsed = json.loads(content or b"")
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _holder_is_dead(found: bytes) -> bool:
    """Return whether the holder was a process of this machine that no longer exists."""
    content = _parse(found)
    return content.get("machine") == _machine() != "" and not _is_alive(content.get("process"))


def _machine() -> str:
    """Return an identifier of the PID namespace and boot of this machine; "" if unknown.

    Host names do not suffice: containers can share one and each number processes from 1.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""


def _is_alive(process: Any) -> bool:
    if not isinstance(process, int) or process < 1:
        return True  # not written by this code; only watching can tell
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process of another user
        return True
    return True
