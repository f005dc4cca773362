"""Lookup of checkpoint directories, steps and manifests."""

from pathlib import Path

import numpy as np

from tjx_ckpt.errors import CorruptCheckpointError, NoCheckpointError
from tjx_ckpt.store.backends import is_remote, open_storage
from tjx_ckpt.store.checkpoint_reader import CheckpointReader
from tjx_ckpt.store.manifest import MANIFEST_NAME, Manifest, ManifestError
from tjx_ckpt.store.manifest import read as read_manifest
from tjx_ckpt.store.storage import Storage
from tjx_ckpt.store.verification import DamagedError

# Subfolder of a run directory.
_CHECKPOINTS = "checkpoints"


def require(storage: Storage, step: int) -> None:
    """Check that a step has a checkpoint.

    Raises
    ------
    NoCheckpointError
        If it has none; lists the existing steps.
    """
    if step not in (steps := storage.steps()):
        have = ", ".join(map(str, steps)) or "none"
        raise NoCheckpointError(f"no checkpoint of step {step} in {storage} (existing: {have})")


def require_manifest(storage: Storage, step: int) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises
    ------
    NoCheckpointError
        If the step has no checkpoint.
    CorruptCheckpointError
        If its manifest is damaged.
    """
    require(storage, step)
    try:
        return read_manifest(storage, step)
    except ManifestError as error:
        raise CorruptCheckpointError(step, [f"{MANIFEST_NAME}: {error}"]) from None


class Checkpoint(CheckpointReader):
    """Reader of one checkpoint whose errors name the damaged file and step.

    Parameters
    ----------
    storage, step
        The directory and the step.

    Raises
    ------
    NoCheckpointError
        If the step has no checkpoint.
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
        """Read and verify a whole leaf.

        Raises
        ------
        CorruptCheckpointError
            If the content of a file differs from what was saved.
        """
        try:
            return super().leaf(key)
        except DamagedError as error:
            raise CorruptCheckpointError(self.step, [f"{self._folder}/{error}"]) from None


def find_directory(directory: str) -> Storage:
    """Return the storage of a checkpoint directory or of the run directory around it.

    Parameters
    ----------
    directory
        Path or URL of a checkpoint directory or of a run directory.

    Raises
    ------
    ValueError
        If it is not a directory, or the folder of a single checkpoint.
    NoCheckpointError
        If it contains no checkpoint, not even a damaged one.
    """
    below = f"{directory.rstrip('/')}/{_CHECKPOINTS}"
    if not is_remote(directory):
        _require_directory(Path(directory))
    for place in (directory, below):
        storage = open_storage(place)
        if storage.steps() or storage.quarantined() or storage.leftovers():
            return storage
    raise NoCheckpointError(
        f"no checkpoint in {directory} or {below}: pass a run directory or a checkpoint directory "
        "(with checkpoint.directory a run saves elsewhere)"
    )


def newest(storage: Storage) -> int:
    """Return the largest step of a directory.

    Raises
    ------
    NoCheckpointError
        If there is no complete checkpoint.
    """
    steps = storage.steps()
    if not steps:
        others = ", ".join([*storage.quarantined(), *storage.leftovers()])
        raise NoCheckpointError(f"no complete checkpoint in {storage} (existing: {others})")
    return steps[-1]


def _require_directory(path: Path) -> None:
    if not path.exists():
        raise ValueError(
            f"{path}: no such directory; pass a run directory or a checkpoint directory"
        )
    if not path.is_dir():
        raise ValueError(
            f"{path}: got a file; expected a run directory or a checkpoint directory (files of "
            "other programs, such as pickles, are never read)"
        )
    if (path / MANIFEST_NAME).is_file():
        raise ValueError(
            f"{path}: got the folder of a single checkpoint; pass the directory that contains it, "
            f"{path.parent}, and its step, {path.name}"
        )
