"""Which checkpoint a restore takes: the one that was asked for, or the newest sound one."""

import warnings
from collections.abc import Callable, Mapping, Sequence

from tjx_ckpt import processes
from tjx_ckpt.errors import (
    AllCheckpointsCorruptError,
    CorruptCheckpointError,
    CorruptCheckpointWarning,
    NoCheckpointError,
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
    """
    require(storage, step)
    result, damage = _attempt(storage, step, read)
    if damage:
        raise CorruptCheckpointError(step, damage)
    assert result is not None
    return result


def read_newest[R](storage: Storage, read: Callable[[int], R]) -> R:
    """Read the newest sound checkpoint; called by all processes.

    Damaged ones that are newer are set aside with a warning, unless another process writes here.

    Parameters
    ----------
    storage, read
        As in `read_step`.

    Raises
    ------
    NoCheckpointError
        If there is none.
    AllCheckpointsCorruptError
        If all are damaged; none is set aside then, so that the next start says the same.
    """
    damaged: dict[int, Sequence[str]] = {}
    gone: set[int] = set()
    while True:
        left = [step for step in storage.steps() if step not in damaged and step not in gone]
        step = processes.from_main(max(left, default=_NONE))
        if step == _NONE:
            raise _nothing_sound(storage, damaged)
        result, damage = _attempt(storage, step, read)
        if result is not None:
            _set_aside(storage, damaged, used=step)
            if damaged:
                processes.all_agree(True)  # all see the directory as it is from now on
            return result
        # A run that saves there at this moment may have pruned the step while it was read.
        if processes.from_main(storage.exists(step)):
            damaged[step] = damage
        else:
            gone.add(step)


def _attempt[R](
    storage: Storage, step: int, read: Callable[[int], R]
) -> tuple[R | None, Sequence[str]]:
    """Return what was read, or else what is wrong; the same of both on all processes."""
    result, mine = None, None
    try:
        result = read(step)
    except ManifestError as error:
        mine = f"{MANIFEST_NAME}: {error}"
    except DamagedError as error:
        mine = str(error)
    if processes.all_agree(mine is None):
        return result, ()
    # Reading stopped at the first bad file; the owner wants to know of each.
    found = problems(storage, step) if processes.is_main() else []
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


def _set_aside(storage: Storage, damaged: Mapping[int, Sequence[str]], *, used: int) -> None:
    if not (damaged and processes.is_main()):
        return
    was_held = storage.lock.held
    may_rename = storage.lock.acquire()
    for step, lines in damaged.items():
        where = f"; it is now {storage.quarantine(step)}" if may_rename else ""
        warnings.warn(
            f"checkpoint of step {step} is damaged ({'; '.join(lines)}){where}; "
            f"step {used} is used instead",
            CorruptCheckpointWarning,
            stacklevel=4,
        )
    if not was_held:
        storage.lock.release()
