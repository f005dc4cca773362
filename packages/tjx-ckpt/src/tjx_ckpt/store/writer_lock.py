"""One writer a directory: two runs that save into one place would delete each other's work."""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from pathlib import Path

_ATTEMPTS = 5
_SECONDS_BETWEEN = 0.01
_MOST_BYTES = 4096


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
        """Take the lock if it is free or already ours; never waits for its owner.

        Raises
        ------
        OSError
            If the lock file cannot be opened or locked, or is a link or no regular file: then it
            belongs to another program, and its content stays as it is.
        """
        if self._descriptor is not None:
            return True
        descriptor = _open(self._path, os.O_RDWR | os.O_CREAT)
        try:
            if not _lock(descriptor):
                os.close(descriptor)
                return False
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def owner(self) -> str:
        """Return who took the lock last, as "process 123 on host"."""
        with contextlib.suppress(OSError):
            descriptor = _open(self._path, os.O_RDONLY)
            try:
                return os.pread(descriptor, _MOST_BYTES, 0).decode("utf-8", "replace")
            finally:
                os.close(descriptor)
        return "another process"

    def holder(self) -> str | None:
        """Return who holds the lock now, ourselves included; None if nobody does."""
        if self.held:
            return self.owner()
        try:
            descriptor = _open(self._path, os.O_RDONLY)
        except OSError:
            return None  # `acquire` reports a lock file that cannot be used
        try:
            # Shared, so that two who look do not see each other; `acquire` outlasts a look.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self.owner()
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return None

    def release(self) -> None:
        """Free the lock if it is ours."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _open(path: Path, flags: int) -> int:
    """Open the lock file itself, not what a link names; a FIFO in its place does not block.

    Raises
    ------
    OSError
        If it cannot be opened, or is no regular file.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ELOOP, "the lock file is no regular file", str(path))
    return descriptor


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
