"""Lock of a checkpoint directory by one run, agreed on by all of its processes."""

import logging
from collections.abc import Sequence

from tjx_ckpt import multihost
from tjx_ckpt.errors import ClaimError, DirectoryInUseError, StorageError
from tjx_ckpt.restore_fallback import quarantine_damaged
from tjx_ckpt.store.storage import Storage

_log = logging.getLogger(__name__)


def take_lock(storage: Storage, damaged: Sequence[int]) -> None:
    """Lock the directory on process 0, or confirm the lock; all processes agree on the result.

    The first call also deletes leftovers, since no other process writes there from then on.

    Parameters
    ----------
    storage
        The directory.
    damaged
        Steps that a restore found damaged; they are renamed.

    Raises
    ------
    DirectoryInUseError
        If another run holds the lock.
    ClaimError, StorageError
        On process 0, if the directory cannot be created or locked.
    """
    mine = True
    problem: ClaimError | StorageError | None = None
    if multihost.is_main():
        try:
            storage.prepare()
            is_first = not storage.lock.held
            mine = storage.lock.acquire()
            if mine and is_first:
                _remove_leftovers(storage)
            if mine:
                quarantine_damaged(storage, damaged)
        except OSError as error:
            mine, problem = False, ClaimError(str(storage), error)
        except StorageError as error:
            mine, problem = False, error
    if multihost.all_true(mine):
        return
    if problem is not None:
        raise problem
    if not multihost.is_main():
        raise DirectoryInUseError(f"process 0 cannot save into {storage}; see its log")
    raise DirectoryInUseError(
        f"{storage.lock.owner()} is saving into {storage}: stop it, or use another directory"
    )


def _remove_leftovers(storage: Storage) -> None:
    """Delete leftovers of killed saves; log failures, since leftovers only take disk space."""
    try:
        storage.remove_leftovers()
    except OSError as error:
        _log.warning("leftovers in %s cannot be deleted now: %s", storage, error)
