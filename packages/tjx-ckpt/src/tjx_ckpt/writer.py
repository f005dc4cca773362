"""Writing of a checkpoint from pieces in host memory.

The order is: arrays -> fsync -> manifest with checksums -> rename. Every process writes its own
pieces and an index of them; process 0 merges the indexes into the manifest and commits.
"""

import contextlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

import tjx_ckpt
from tjx_ckpt import multihost
from tjx_ckpt.host_staging import StagedPiece, by_group
from tjx_ckpt.leaf_spec import LeafSpec
from tjx_ckpt.store import manifest as manifest_file
from tjx_ckpt.store import tensor_file
from tjx_ckpt.store.manifest import MANIFEST_NAME, Manifest
from tjx_ckpt.store.storage import Storage
from tjx_ckpt.store.tensor_file import TensorFile

# More threads would take CPU time from training.
_WRITERS = 2


class PendingCheckpoint(NamedTuple):
    """Content of a checkpoint that is being saved.

    Attributes
    ----------
    step
        Its step.
    leaves
        Shape and dtype of each whole leaf.
    pieces
        The pieces that this process writes.
    metadata, metrics
        Arguments of `Checkpointer.save`.
    before_commit
        Called on process 0 after all files are on disk and before the rename.
    """

    step: int
    leaves: Mapping[str, LeafSpec]
    pieces: Sequence[StagedPiece]
    metadata: Mapping[str, Any]
    metrics: Mapping[str, float]
    before_commit: Callable[[], object] | None = None


class SaveReport(NamedTuple):
    """Duration and size of a durable save.

    Attributes
    ----------
    step
        The saved step.
    blocking_seconds
        Time that `Checkpointer.save` blocked, without the wait for the previous save.
    seconds
        Time until the checkpoint was durable.
    size_bytes
        Bytes of the arrays of all processes; 0 on processes other than 0.
    """

    step: int
    blocking_seconds: float
    seconds: float
    size_bytes: int


def write_checkpoint(storage: Storage, pending: PendingCheckpoint, *, name: str) -> int:
    """Write a checkpoint; called by all processes, each in a thread.

    Parameters
    ----------
    storage
        Locked by process 0.
    pending
        The content.
    name
        Unique name of this save, for barriers.

    Returns
    -------
    int
        Bytes of all arrays on process 0; 0 on other processes.

    Raises
    ------
    OSError
        If a file cannot be written. All processes then delete their part of the checkpoint.
    """
    size = 0
    try:
        # Processes that failed reach each barrier too, so that the others do not wait forever.
        try:
            if multihost.is_main():
                storage.begin(pending.step)
        finally:
            multihost.barrier(f"begin {name}")
        try:
            _write_pieces(storage, pending)
        finally:
            multihost.barrier(f"written {name}")
        try:
            if multihost.is_main():
                size = _commit(storage, pending)
        finally:
            multihost.barrier(f"committed {name}")
        if not storage.exists(pending.step):
            raise FileNotFoundError("process 0 did not commit it; see its log")
    except BaseException:
        if multihost.is_main():
            _abandon(storage, pending.step)
        raise
    return size


def _write_pieces(storage: Storage, pending: PendingCheckpoint) -> None:
    process = jax.process_index()

    def write(group: str, pieces: Sequence[StagedPiece]) -> tuple[str, TensorFile]:
        file_name = f"{group}-{process:05}.safetensors"
        with storage.create(pending.step, file_name) as file_write:
            return file_name, tensor_file.write(file_write, pieces)

    groups = by_group(pending.pieces)
    # One file is written while another is flushed.
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="save") as pool:
        files = dict(pool.map(write, groups.keys(), groups.values()))
    content = {file_name: manifest_file.file_to_json(file) for file_name, file in files.items()}
    with storage.create(pending.step, _index_name(process)) as file_write:
        file_write(manifest_file.with_checksum(content))


def _commit(storage: Storage, pending: PendingCheckpoint) -> int:
    files = {}
    for process in range(jax.process_count()):
        index_name = _index_name(process)
        try:
            index = manifest_file.without_checksum(storage.read_new(pending.step, index_name))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"process {process} did not write its part; see its log"
            ) from None
        files.update({name: manifest_file.file_from_json(entry) for name, entry in index.items()})
        storage.remove_new(pending.step, index_name)
    content = Manifest(
        step=pending.step,
        metadata=dict(pending.metadata),
        metrics=dict(pending.metrics),
        versions=_versions(),
        leaves=dict(pending.leaves),
        files=files,
    )
    text = manifest_file.render(content)
    manifest_file.parse(text)  # raises now if the pieces do not cover the leaves
    with storage.create(pending.step, MANIFEST_NAME) as file_write:
        file_write(text)
    if pending.before_commit is not None:
        pending.before_commit()
    storage.commit(pending.step)
    return content.size_bytes


def _abandon(storage: Storage, step: int) -> None:
    # A second error would hide the first. Object stores have their own exception classes.
    with contextlib.suppress(Exception):
        storage.abandon(step)


def _index_name(process: int) -> str:
    return f"index-{process:05}.json"


def _versions() -> dict[str, str]:
    others = {name: importlib.metadata.version(name) for name in ("jax", "numpy")}
    return {"tjx-ckpt": tjx_ckpt.__version__, **others}
