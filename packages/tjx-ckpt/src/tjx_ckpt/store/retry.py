"""Retries of reads after errors that do not indicate damage.

I/O errors, stale NFS handles, too many open files and missing permissions are often temporary. Only
a missing file, a wrong size and a wrong checksum indicate damage.
"""

import errno
import time
from collections.abc import Callable

from tjx_ckpt.errors import UnreadableError
from tjx_ckpt.store.storage import WrongFileError

PAUSES_S = (0.05, 0.25, 1.0)
"""Seconds between the attempts."""

# A link instead of a file, or a file in the middle of its path: retries cannot succeed.
_WRONG_KIND = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO}


def with_retries[R](place: str, read: Callable[[], R]) -> R:
    """Call ``read`` until it succeeds, with pauses in between.

    Parameters
    ----------
    place
        Path or URL for the error message.
    read
        Retried after an OSError, up to ``len(PAUSES_S)`` times.

    Returns
    -------
    object
        The result of ``read``.

    Raises
    ------
    FileNotFoundError, WrongFileError
        Without retries, since they indicate damage.
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
