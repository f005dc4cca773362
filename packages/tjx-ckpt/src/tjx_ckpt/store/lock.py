"""One writer a directory: two runs that save into one place would delete each other's work."""

import fcntl
import os
import socket
import time
from pathlib import Path

_ATTEMPTS = 5
_SECONDS_BETWEEN = 0.01


class WriterLock:
    """An advisory lock on a directory; the kernel frees it when its holder dies.

    Parameters
    ----------
    directory
        The checkpoint directory. The lock is its file ``.writer``, which names the owner.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".writer"
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether the lock is ours."""
        return self._descriptor is not None

    def acquire(self) -> bool:
        """Take the lock if it is free or already ours; waits no longer than a look at it takes."""
        if self._descriptor is not None:
            return True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _lock(descriptor):
                os.close(descriptor)
                return False
        except BaseException:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._descriptor = descriptor
        return True

    def owner(self) -> str:
        """Return who took the lock last, as "process 123 on host"."""
        return self._path.read_text(encoding="utf-8", errors="replace")

    def holder(self) -> str | None:
        """Return who holds the lock now, ourselves included; None if nobody does."""
        if self.held:
            return self.owner()
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            # Shared, so that two who look do not see each other; `acquire` outlasts a look.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self.owner()
        finally:
            os.close(descriptor)
        return None

    def release(self) -> None:
        """Free the lock if it is ours."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _lock(descriptor: int) -> bool:
    """Lock a file; who looks whether it is locked holds it for microseconds."""
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt + 1 < _ATTEMPTS:
                time.sleep(_SECONDS_BETWEEN)
        else:
            return True
    return False
