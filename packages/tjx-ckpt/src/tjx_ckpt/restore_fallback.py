"""Which checkpoint a restore takes: the one that was asked for, or the newest sound one."""

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

# What stands for "no such step" where processes exchange steps.
_NONE = -1


def read_step[R](storage: Storage, step: int, read: Callable[[int], R]) -> R:
    """Read the checkpoint of a step; called by all processes.

    Parameters
    ----------
    storage
        Where it lies.
    step
        Which one.
    read
        Reads a step and checks what it reads: ManifestError or DamagedError if it is damaged.

    Raises
    ------
    NoCheckpointError
        If there is no such checkpoint.
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
    """Read the newest sound checkpoint; called by all processes.

    Damaged ones that are newer are passed over with a warning. They are renamed where this process
    holds the lock of the directory; who only reads changes nothing there.

    Parameters
    ----------
    storage, read
        As in `read_step`.

    Returns
    -------
    tuple
        What was read, and the damaged steps that keep their names because the lock is not held.

    Raises
    ------
    NoCheckpointError
        If there is none.
    AllCheckpointsCorruptError
        If all are damaged; none is set aside then, so that the next start says the same.
    UnreadableError
        If one cannot be read now; an older one would lose the steps between them.
    """
    damaged: dict[int, Sequence[str]] = {}
    gone: set[int] = set()
    while True:
        left = [step for step in storage.steps() if step not in damaged and step not in gone]
        step = multihost.from_main(max(left, default=_NONE))
        if step == _NONE:
            raise _nothing_sound(storage, damaged)
        result, damage = _attempt(storage, step, read)
        if result is not None:
            left = _warn(storage, damaged, used=step)
            if damaged:
                multihost.all_agree(True)  # all see the directory as it is from now on
            return result, left
        # A run that saves there at this moment may have pruned the step while it was read.
        if multihost.from_main(storage.exists(step)):
            damaged[step] = damage
        else:
            gone.add(step)


def _attempt[R](
    storage: Storage, step: int, read: Callable[[int], R]
) -> tuple[R | None, Sequence[str]]:
    """Return what was read, or else what is wrong; the same of both on all processes."""
    result, mine, unreadable = None, None, None
    try:
        result = read(step)
    except ManifestError as error:
        mine = f"{MANIFEST_NAME}: {error}"
    except DamagedError as error:
        mine = str(error)
    except UnreadableError as error:
        unreadable = error
    if not multihost.all_agree(unreadable is None):
        raise unreadable or UnreadableError(
            f"{storage}/{step}", RuntimeError("another process failed; its log says why")
        )
    if multihost.all_agree(mine is None):
        return result, ()
    # Reading stopped at the first bad file; the owner wants to know of each.
    found = problems(storage, step) if multihost.is_main() else []
    return None, found or [mine or "another process could not read its part; its log says why"]


def _nothing_sound(storage: Storage, damaged: Mapping[int, Sequence[str]]) -> Exception:
    quarantined = storage.quarantined()
    if not (damaged or quarantined):
        return NoCheckpointError(f"no checkpoint in {storage}")
    message = f"every checkpoint in {storage} is damaged"
    if quarantined:
        message += f" ({', '.join(quarantined)} were set aside before)"
    message += ": repair one, or use another directory to start anew"
    return AllCheckpointsCorruptError(message, damaged)


def set_aside(storage: Storage, steps: Sequence[int]) -> None:
    """Rename checkpoints that a restore passed over, if they still are there and damaged.

    Parameters
    ----------
    storage
        Locked by this process.
    steps
        Which. Another run may have replaced them since.
    """
    for step in steps:
        if storage.exists(step) and (lines := problems(storage, step)):
            name = storage.quarantine(step)
            warnings.warn(
                f"checkpoint of step {step} is damaged ({'; '.join(lines)}); it is now {name}",
                CorruptCheckpointWarning,
                stacklevel=4,
            )


def _warn(storage: Storage, damaged: Mapping[int, Sequence[str]], *, used: int) -> list[int]:
    """Warn of damaged steps, and rename them where the lock is held; return the others."""
    if not multihost.is_main():
        return []
    left = []
    for step, lines in damaged.items():
        where = ""
        if storage.lock.held:
            where = f"; it is now {storage.quarantine(step)}"
        else:
            left.append(step)
        warnings.warn(
            f"checkpoint of step {step} is damaged ({'; '.join(lines)}){where}; "
            f"step {used} is used instead",
            CorruptCheckpointWarning,
            stacklevel=4,
        )
    return left
