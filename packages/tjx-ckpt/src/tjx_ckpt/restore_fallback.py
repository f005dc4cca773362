"""Reading of the requested checkpoint, or of the newest intact one."""

import warnings
from collections.abc import Callable, Mapping, Sequence

from tjx_ckpt import multihost
from tjx_ckpt.errors import (
    AllCheckpointsCorruptError,
    CorruptCheckpointError,
    CorruptCheckpointWarning,
    NoCheckpointError,
    UnreadableError,
)
from tjx_ckpt.lookup import require
from tjx_ckpt.store.manifest import MANIFEST_NAME, ManifestError
from tjx_ckpt.store.storage import Storage
from tjx_ckpt.store.verification import DamagedError, problems

# Broadcast to the other processes if there is no step.
_NO_STEP = -1


def read_step[R](storage: Storage, step: int, read: Callable[[int], R]) -> R:
    """Read the checkpoint of a step; called by all processes.

    Parameters
    ----------
    storage
        The checkpoints.
    step
        Step to read.
    read
        Reads and verifies a step; raises ManifestError or DamagedError if it is damaged.

    Returns
    -------
    object
        The result of `read`.

    Raises
    ------
    NoCheckpointError
        If the step has no checkpoint.
    CorruptCheckpointError
        If it is damaged.
    UnreadableError
        If it cannot be read now.
    """
    require(storage, step)
    result, damage = _attempt(storage, step, read)
    if damage:
        raise CorruptCheckpointError(step, damage)
    assert result is not None
    return result


def read_newest[R](storage: Storage, read: Callable[[int], R]) -> tuple[R, list[int]]:
    """Read the newest intact checkpoint; called by all processes.

    Newer checkpoints that are damaged are skipped with a warning, and renamed to ``N.corrupt`` if
    this process holds the lock of the directory.

    Parameters
    ----------
    storage, read
        As in `read_step`.

    Returns
    -------
    tuple
        The result of `read`, and the damaged steps that were not renamed for want of the lock.

    Raises
    ------
    NoCheckpointError
        If there is none.
    AllCheckpointsCorruptError
        If all are damaged; none is renamed, so that the next start raises the same error.
    UnreadableError
        If one cannot be read now; an older one would lose the steps in between.
    """
    damaged: dict[int, Sequence[str]] = {}
    gone: set[int] = set()
    while True:
        left = [step for step in storage.steps() if step not in damaged and step not in gone]
        step = multihost.from_main(max(left, default=_NO_STEP))
        if step == _NO_STEP:
            raise _no_intact_checkpoint(storage, damaged)
        result, damage = _attempt(storage, step, read)
        if result is not None:
            left = _warn(storage, damaged, used=step)
            if damaged:
                multihost.all_true(
                    True
                )  # a barrier: from here on all processes see the renamed folders
            return result, left
        # A run that saves into the directory can have pruned the step while it was read.
        if multihost.from_main(storage.exists(step)):
            damaged[step] = damage
        else:
            gone.add(step)


def _attempt[R](
    storage: Storage, step: int, read: Callable[[int], R]
) -> tuple[R | None, Sequence[str]]:
    """Return the result of `read`, or the problems found; all processes return the same kind."""
    result, mine, unreadable = None, None, None
    try:
        result = read(step)
    except ManifestError as error:
        mine = f"{MANIFEST_NAME}: {error}"
    except DamagedError as error:
        mine = str(error)
    except UnreadableError as error:
        unreadable = error
    if not multihost.all_true(unreadable is None):
        raise unreadable or UnreadableError(
            f"{storage}/{step}", RuntimeError("another process failed; see its log")
        )
    if multihost.all_true(mine is None):
        return result, ()
    # Reading stopped at the first bad file; report all of them.
    found = problems(storage, step) if multihost.is_main() else []
    return None, found or [mine or "another process could not read its part; see its log"]


def _no_intact_checkpoint(storage: Storage, damaged: Mapping[int, Sequence[str]]) -> Exception:
    quarantined = storage.quarantined()
    if not (damaged or quarantined):
        return NoCheckpointError(f"no checkpoint in {storage}")
    message = f"every checkpoint in {storage} is damaged"
    if quarantined:
        message += f" ({', '.join(quarantined)} were renamed before)"
    message += ": repair one, or use another directory to start from scratch"
    return AllCheckpointsCorruptError(message, damaged)


def quarantine_damaged(storage: Storage, steps: Sequence[int]) -> None:
    """Rename checkpoints that a restore skipped, if they still exist and are damaged.

    Parameters
    ----------
    storage
        Locked by this process.
    steps
        Skipped steps. Another run can have replaced them since.
    """
    for step in steps:
        if storage.exists(step) and (lines := problems(storage, step)):
            name = storage.quarantine(step)
            warnings.warn(
                f"checkpoint of step {step} is damaged ({'; '.join(lines)}); renamed to {name}",
                CorruptCheckpointWarning,
                stacklevel=4,
            )


def _warn(storage: Storage, damaged: Mapping[int, Sequence[str]], *, used: int) -> list[int]:
    """Warn about damaged steps and rename them if the lock is held; return the others."""
    if not multihost.is_main():
        return []
    left = []
    for step, lines in damaged.items():
        where = ""
        if storage.lock.held:
            where = f"; renamed to {storage.quarantine(step)}"
        else:
            left.append(step)
        warnings.warn(
            f"checkpoint of step {step} is damaged ({'; '.join(lines)}){where}; "
            f"using step {used} instead",
            CorruptCheckpointWarning,
            stacklevel=4,
        )
    return left
