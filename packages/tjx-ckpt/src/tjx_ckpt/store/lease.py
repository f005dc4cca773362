"""The right to write where no kernel keeps locks: an object that its holder renews all the time.

Clocks of different machines are never compared. Who finds a lease watches it: one that changes has
a living holder, one that stays as it is for two periods has none and is taken over. On the machine
of its holder a dead holder is known at once.
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
_LOOKS_PER_PERIOD = 10


class Lease:
    """A lock on a directory of an object store; implements `tjx_ckpt.store.storage.Lock`.

    A holder that slept too long can find that another took over. It has lost the lease for good
    then: `acquire` says no, `confirm` raises.

    Parameters
    ----------
    store
        The fsspec file system.
    path
        Of the lease in it; names its owner.
    period_s
        Between two renewals.
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
        """Whether the lease is ours, as far as is known."""
        return self._thread is not None and not self._lost

    def acquire(self) -> bool:
        """Take the lease if it is free or already ours; watches one that is there.

        Returns
        -------
        bool
            False if another holds it, or took it from us.

        Raises
        ------
        StorageError
            If the store does not take it.
        PermissionError
            If we may not write there.
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
        """Look whether the lease is still ours.

        Raises
        ------
        DirectoryInUseError
            If another took it over.
        """
        if not (self.held and self._is_ours()):
            self._lost = True
            raise DirectoryInUseError(
                f"{self.owner()} took over {self._path}: this process was not heard of for too long"
            )

    def owner(self) -> str:
        """Return who took the lease last, as "process 123 on host"."""
        content = _parse(self._read())
        if not content:
            return "another process"
        return f"process {content.get('process')} on {content.get('host')}"

    def holder(self) -> str | None:
        """Return who holds the lease now, as far as a look can tell; None if nobody does."""
        found = self._read()
        return None if found is None or _is_of_dead_neighbour(found) else self.owner()

    def release(self) -> None:
        """Free the lease if it is ours."""
        if self._thread is None:
            return
        self._released.set()
        self._thread.join()
        self._thread = None
        if not self._lost and self._is_ours():
            self._store.rm_file(self._path)

    def _claim(self, found: bytes | None) -> bool:
        """Write our lease over none, or over the abandoned one; whoever writes last has it."""
        now = self._read()
        if now is None:
            try:
                self._store.pipe_file(self._path, self._content(), mode="create")
            except PermissionError:
                raise
            except OSError as error:
                # Another was first, or a repeated request met its own success: look.
                if self._read() is None:
                    raise StorageError(f"{self._path}: cannot be written ({error})") from error
        elif now == found:
            self._store.pipe_file(self._path, self._content())
        return self._is_ours()

    def _is_abandoned(self, found: bytes) -> bool:
        if _is_of_dead_neighbour(found):
            return True
        end = time.monotonic() + 2 * self._period_s
        while time.monotonic() < end:
            time.sleep(self._period_s / _LOOKS_PER_PERIOD)
            now = self._read()
            if now != found:
                return now is None
        return True

    def _renew(self) -> None:
        """Renew the lease until it is released or lost; in a thread."""
        while not self._released.wait(self._period_s):
            try:
                if not self._is_ours():
                    self._lost = True
                    _log.error("%s: %s took it over", self._path, self.owner())
                    return
                self._store.pipe_file(self._path, self._content())
            except Exception as error:  # the store may answer again; others wait two periods
                _log.warning("%s: not renewed (%s: %s)", self._path, type(error).__name__, error)

    def _is_ours(self) -> bool:
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
    """Return what a lease says; nothing of one that cannot be read."""
    try:
        parsed = json.loads(content or b"")
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _is_of_dead_neighbour(found: bytes) -> bool:
    """Tell whether the holder was a process of this machine that is gone."""
    content = _parse(found)
    return content.get("machine") == _machine() != "" and not _is_alive(content.get("process"))


def _machine() -> str:
    """Return what is the same exactly where process numbers mean the same; "" where unknown.

    Host names do not tell: containers may share one and count their processes each from 1.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""


def _is_alive(process: Any) -> bool:
    if not isinstance(process, int) or process < 1:
        return True  # no process of ours wrote this: only watching tells
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
