"""The names in a checkpoint directory, and the moves between them that survive a crash.

``12``            a checkpoint of step 12, complete from the moment it has this name
``12.tmp``        a save under way, or what a killed save left
``12.discarded.tmp``  a checkpoint being deleted
``12.corrupt``    a damaged checkpoint, kept for its owner to look at
"""

import os
import re
import shutil
from pathlib import Path

_LEFTOVER = re.compile(r"\d+(\.discarded)?\.tmp")
_QUARANTINED = re.compile(r"(\d+)\.corrupt(\.\d+)?")


def step_path(directory: Path, step: int) -> Path:
    """Return where the complete checkpoint of ``step`` lies."""
    return directory / str(step)


def temporary_path(directory: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` lies while it is written."""
    return directory / f"{step}.tmp"


def list_steps(directory: Path) -> list[int]:
    """Return the steps that have a complete checkpoint, ascending by number."""
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name))


def list_quarantined(directory: Path) -> list[str]:
    """Return the names of the damaged checkpoints that were set aside."""
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if _QUARANTINED.fullmatch(path.name))


def commit(directory: Path, step: int) -> None:
    """Give a written and flushed checkpoint its final name, atomically."""
    temporary_path(directory, step).rename(step_path(directory, step))
    _fsync(directory)


def discard(directory: Path, step: int) -> None:
    """Delete a checkpoint so that a crash never leaves half of it under its name."""
    doomed = directory / f"{step}.discarded.tmp"
    if doomed.exists():
        shutil.rmtree(doomed)
    step_path(directory, step).rename(doomed)
    shutil.rmtree(doomed)


def quarantine(directory: Path, step: int) -> Path:
    """Rename a damaged checkpoint to ``N.corrupt`` (``N.corrupt.2``, ... if that is taken)."""
    target = directory / f"{step}.corrupt"
    number = 2
    while target.exists():
        target = directory / f"{step}.corrupt.{number}"
        number += 1
    step_path(directory, step).rename(target)
    _fsync(directory)
    return target


def list_leftovers(directory: Path) -> list[Path]:
    """Return what killed saves and deletions left, and a save that is under way."""
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if _LEFTOVER.fullmatch(path.name)]


def remove_leftovers(directory: Path) -> None:
    """Delete what killed saves and deletions left."""
    for path in list_leftovers(directory):
        shutil.rmtree(path)


def fsync_tree(folder: Path) -> None:
    """Flush each file below ``folder``, and each folder, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
