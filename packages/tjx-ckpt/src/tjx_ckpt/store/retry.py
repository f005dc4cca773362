"""Repeat a read that fails for a reason that says nothing about the file's content.

An I/O error, a stale NFS handle, too many open files or a missing permission often pass. Only a
missing file, a wrong size and a wrong checksum are damage.
"""

import errno
import time
from collections.abc import Callable

from tjx_ckpt.errors import UnreadableError
from tjx_ckpt.store.storage import WrongFileError

PAUSES_S = (0.05, 0.25, 1.0)
"""Seconds between the attempts."""

# A link in the place of a file, a part of its path that is a file: another attempt changes nothing.
_WRONG_KIND = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO}


def with_retries[R](place: str, read: Callable[[], R]) -> R:
    """Return what ``read`` returns, from the first attempt that does not fail.

    Parameters
    ----------
    place
        What is read, for the error.
    read
        Called again after an OSError, up to ``len(PAUSES_S)`` times.

    Raises
    ------
    FileNotFoundError, WrongFileError
        At once: they describe the file.
    UnreadableError
        If every attempt failed.
    """
    for pause in PAUSES_S:
        try:
            return read()
        except (FileNotFoundError, WrongFileError):
            raise
        except OSError as error:
            if error.errno in _WRONG_KIND:
                raise WrongFileError(error.errno, error.strerror, place) from None
            time.sleep(pause)
    try:
        return read()
    except (FileNotFoundError, WrongFileError):
        raise
    except OSError as error:
        raise UnreadableError(place, error) from error
