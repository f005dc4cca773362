"""File lock that allows one writer per checkpoint directory."""

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
    """Advisory lock on a directory; the kernel releases it when its holder dies.

    Parameters
    ----------
    directory
        The checkpoint directory. Its file ``.writer`` is locked and names the owner.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".writer"
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> bool:
        """Acquire the lock if it is free or already held by this object; never wait for its owner.

        Raises
        ------
        OSError
            If the lock file cannot be opened or locked, or is a link or not a regular file; such
            a file belongs to another program and is not changed.
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
        """Return the last process that acquired the lock, as "process 123 on host"."""
        with contextlib.suppress(OSError):
            descriptor = _open(self._path, os.O_RDONLY)
            try:
                return os.pread(descriptor, _MOST_BYTES, 0).decode("utf-8", "replace")
            finally:
                os.close(descriptor)
        return "another process"

    def holder(self) -> str | None:
        """Return the process that holds the lock, possibly this one, or None."""
        if self.held:
            return self.owner()
        try:
            descriptor = _open(self._path, os.O_RDONLY)
        except OSError:
            return None  # `acquire` reports unusable lock files
        try:
            # Shared, so that two concurrent checks do not report each other; `acquire` retries.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self.owner()
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return None

    def release(self) -> None:
        """Release the lock if this object holds it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _open(path: Path, flags: int) -> int:
    """Open the lock file without following links or blocking on a FIFO.

    Raises
    ------
    OSError
        If it cannot be opened or is not a regular file.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ELOOP, "the lock file is not a regular file", str(path))
    return descriptor


def _lock(descriptor: int) -> bool:
    """Lock a file; retry, since `WriterLock.holder` locks it for microseconds."""
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt + 1 < _ATTEMPTS:
                time.sleep(_SECONDS_BETWEEN)
        else:
            return True
    return False
