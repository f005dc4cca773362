"""One save, from pieces in host memory to a complete checkpoint.

The order is: arrays -> flush to disk -> manifest with checksums -> rename. Every process writes its
own pieces and an index of them; process 0 makes the manifest of all indexes and commits.
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

# More would take the processor from the training.
_WRITERS = 2


class Draft(NamedTuple):
    """What a checkpoint is to hold.

    Attributes
    ----------
    step
        Its number.
    leaves
        Shape and dtype of each leaf, of all processes.
    pieces
        This process's part of them.
    metadata, metrics
        What the caller said of it.
    before_commit
        Called on process 0 when all files are on disk and the checkpoint has no name yet.
    """

    step: int
    leaves: Mapping[str, LeafSpec]
    pieces: Sequence[StagedPiece]
    metadata: Mapping[str, Any]
    metrics: Mapping[str, float]
    before_commit: Callable[[], object] | None = None


def write_checkpoint(storage: Storage, draft: Draft, *, name: str) -> int:
    """Write a checkpoint; called by all processes, each in a thread.

    Parameters
    ----------
    storage
        Locked by process 0.
    draft
        What to write.
    name
        Of this save, used once.

    Returns
    -------
    int
        Bytes of all arrays; on process 0.

    Raises
    ------
    OSError
        What went wrong. Nothing is left of the checkpoint then, on any process.
    """
    size = 0
    try:
        # Each barrier is reached by all processes, also by one that failed: nobody waits for it.
        try:
            if multihost.is_main():
                storage.begin(draft.step)
        finally:
            multihost.barrier(f"begin {name}")
        try:
            _write_pieces(storage, draft)
        finally:
            multihost.barrier(f"written {name}")
        try:
            if multihost.is_main():
                size = _commit(storage, draft)
        finally:
            multihost.barrier(f"committed {name}")
        if not storage.exists(draft.step):
            raise FileNotFoundError("process 0 did not commit it; its log says why")
    except BaseException:
        if multihost.is_main():
            _abandon(storage, draft.step)
        raise
    return size


def _write_pieces(storage: Storage, draft: Draft) -> None:
    process = jax.process_index()

    def write(group: str, pieces: Sequence[StagedPiece]) -> tuple[str, TensorFile]:
        file_name = f"{group}-{process:05}.safetensors"
        with storage.create(draft.step, file_name) as file_write:
            return file_name, tensor_file.write(file_write, pieces)

    groups = by_group(draft.pieces)
    # While one file is flushed, another is written.
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="save") as pool:
        files = dict(pool.map(write, groups.keys(), groups.values()))
    content = {file_name: manifest_file.file_to_json(file) for file_name, file in files.items()}
    with storage.create(draft.step, _index_name(process)) as file_write:
        file_write(manifest_file.sealed(content))


def _commit(storage: Storage, draft: Draft) -> int:
    files = {}
    for process in range(jax.process_count()):
        index_name = _index_name(process)
        try:
            index = manifest_file.unsealed(storage.read_new(draft.step, index_name))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"process {process} did not write its part; its log says why"
            ) from None
        files.update({name: manifest_file.file_from_json(entry) for name, entry in index.items()})
        storage.remove_new(draft.step, index_name)
    content = Manifest(
        step=draft.step,
        metadata=dict(draft.metadata),
        metrics=dict(draft.metrics),
        versions=_versions(),
        leaves=dict(draft.leaves),
        files=files,
    )
    text = manifest_file.render(content)
    manifest_file.parse(text)  # pieces that do not make up the leaves are found now, not later
    with storage.create(draft.step, MANIFEST_NAME) as file_write:
        file_write(text)
    if draft.before_commit is not None:
        draft.before_commit()
    storage.commit(draft.step)
    return content.size_bytes


def _abandon(storage: Storage, step: int) -> None:
    # Frees the space; a second error here would only hide the first. Object stores raise their own.
    with contextlib.suppress(Exception):
        storage.abandon(step)


def _index_name(process: int) -> str:
    return f"index-{process:05}.json"


def _versions() -> dict[str, str]:
    others = {name: importlib.metadata.version(name) for name in ("jax", "numpy")}
    return {"tjx-ckpt": tjx_ckpt.__version__, **others}
