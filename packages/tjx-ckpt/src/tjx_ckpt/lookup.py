"""Which directory, which step, and what it says of itself; for the library and the command."""

from pathlib import Path

import numpy as np

from tjx_ckpt.errors import CorruptCheckpointError, NoCheckpointError
from tjx_ckpt.store.backends import is_remote, open_storage
from tjx_ckpt.store.checkpoint_reader import CheckpointReader
from tjx_ckpt.store.manifest import MANIFEST_NAME, Manifest, ManifestError
from tjx_ckpt.store.manifest import read as read_manifest
from tjx_ckpt.store.storage import Storage
from tjx_ckpt.store.verification import DamagedError

# Below the directory of a run.
_CHECKPOINTS = "checkpoints"


def require(storage: Storage, step: int) -> None:
    """Refuse a step that is not there.

    Raises
    ------
    NoCheckpointError
        Naming the steps that are there.
    """
    if step not in (steps := storage.steps()):
        have = ", ".join(map(str, steps)) or "none"
        raise NoCheckpointError(f"no checkpoint of step {step} in {storage} (there are: {have})")


def require_manifest(storage: Storage, step: int) -> Manifest:
    """Return all that a checkpoint says of itself.

    Raises
    ------
    NoCheckpointError
        If there is no such checkpoint.
    CorruptCheckpointError
        If its manifest is damaged.
    """
    require(storage, step)
    try:
        return read_manifest(storage, step)
    except ManifestError as error:
        raise CorruptCheckpointError(step, [f"{MANIFEST_NAME}: {error}"]) from None


class Checkpoint(CheckpointReader):
    """One checkpoint to read, whose errors say which file of which step is damaged.

    Parameters
    ----------
    storage, step
        Where and which.

    Raises
    ------
    NoCheckpointError
        If there is no such checkpoint.
    CorruptCheckpointError
        If its manifest is damaged.
    """

    def __init__(self, storage: Storage, step: int) -> None:
        self.name = f"{storage} step {step}"
        self.step = step
        self._folder = f"{storage}/{step}"
        super().__init__(storage, step, require_manifest(storage, step))

    def __enter__(self) -> "Checkpoint":
        return self

    def leaf(self, key: str) -> np.ndarray:
        """Return a whole leaf.

        Raises
        ------
        CorruptCheckpointError
            If a file that it needs is not what was saved.
        """
        try:
            return super().leaf(key)
        except DamagedError as error:
            raise CorruptCheckpointError(self.step, [f"{self._folder}/{error}"]) from None


def find_directory(directory: str) -> Storage:
    """Return the checkpoints of a directory: its own, or those of the run that it belongs to.

    Parameters
    ----------
    directory
        A directory of checkpoints, or of a run that has one: a path or a URL.

    Raises
    ------
    ValueError
        If it is no directory, or that of a single checkpoint.
    NoCheckpointError
        If it has no checkpoint, not even a damaged one.
    """
    below = f"{directory.rstrip('/')}/{_CHECKPOINTS}"
    if not is_remote(directory):
        _require_directory(Path(directory))
    for place in (directory, below):
        storage = open_storage(place)
        if storage.steps() or storage.quarantined() or storage.leftovers():
            return storage
    raise NoCheckpointError(
        f"no checkpoint in {directory} or {below}: give the directory of a run or of its "
        "checkpoints (a run keeps them elsewhere where checkpoint.directory is set)"
    )


def newest(storage: Storage) -> int:
    """Return the largest step.

    Raises
    ------
    NoCheckpointError
        If there is none.
    """
    steps = storage.steps()
    if not steps:
        aside = ", ".join([*storage.quarantined(), *storage.leftovers()])
        raise NoCheckpointError(f"no complete checkpoint in {storage} (there are: {aside})")
    return steps[-1]


def _require_directory(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path}: no such directory; give that of a run or of its checkpoints")
    if not path.is_dir():
        raise ValueError(
            f"{path} is a file: give the directory of a run or of its checkpoints; files of other "
            "programs, pickles among them, are never read"
        )
    if (path / MANIFEST_NAME).is_file():
        raise ValueError(
            f"{path} is a single checkpoint: give the directory that it is in, {path.parent}, "
            f"and its step, {path.name}"
        )
