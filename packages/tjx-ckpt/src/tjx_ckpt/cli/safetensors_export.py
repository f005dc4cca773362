"""Subcommand ``export``: safetensors files with whole tensors for other programs."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from tjx_ckpt.cli.key_paths import below
from tjx_ckpt.leaf_spec import LeafSpec, is_float
from tjx_ckpt.lookup import Checkpoint
from tjx_ckpt.store.checksum import chunks
from tjx_ckpt.store.temporary_files import hold, remove_abandoned, temporary_name
from tjx_ckpt.store.tensor_file import as_bytes, is_known, render_header
from tjx_core import fsync_path

SUFFIX = ".safetensors"
# Some readers require tensors to start at a multiple of this and of the element size.
_ALIGNMENT = 64


class ExportedTensor(NamedTuple):
    """Name of a tensor in the file, key of its leaf, and its exported shape and dtype."""

    name: str
    key: str
    spec: LeafSpec


def plan_tensors(
    leaves: Mapping[str, LeafSpec], *, only: str, dtype: str | None, separator: str
) -> list[ExportedTensor]:
    """Return the tensors of an export, in the order of their keys.

    Parameters
    ----------
    leaves
        Leaves of the checkpoint.
    only
        Export leaves at or below this key, without the key in their names.
    dtype
        Dtype of exported floating-point leaves; None: as saved.
    separator
        Separator of key parts in names.

    Raises
    ------
    ValueError
        If no leaf is selected, two names are equal, or safetensors lacks a dtype.
    """
    tensors = []
    for key in below(leaves, only):
        saved = leaves[key]
        spec = LeafSpec(saved.shape, dtype if dtype and is_float(saved.dtype) else saved.dtype)
        if not is_known(spec.dtype):
            raise ValueError(
                f"{key}: got dtype {spec.dtype}, which safetensors lacks; exclude it with --only, "
                "or convert floating-point leaves with --dtype"
            )
        tensors.append(ExportedTensor(name_below(key, only).replace("/", separator), key, spec))
    _check_unique(tensors, separator)
    return tensors


def name_below(key: str, prefix: str) -> str:
    """Return the part of a key below a prefix; its last part if the key is the prefix.

    Examples
    --------
    >>> name_below("params/blocks/w", "params"), name_below("params/w", "params/w")
    ('blocks/w', 'w')
    """
    prefix = prefix.strip("/")
    return key.removeprefix(f"{prefix}/") if key != prefix else key.rpartition("/")[2]


def export(
    checkpoint: Checkpoint,
    tensors: Sequence[ExportedTensor],
    out: Path,
    *,
    max_shard_bytes: int,
    progress: Callable[[int], None],
) -> list[Path]:
    """Write all tensors to new files, or none, with one tensor in memory at a time.

    Parameters
    ----------
    checkpoint
        The checkpoint. Every byte is verified as it is read.
    tensors
        Tensors to write.
    out
        ``model.safetensors``. If the tensors have more than ``max_shard_bytes``, the files are
        ``model-00001-of-00003.safetensors``, ... and ``model.safetensors.index.json``.
    max_shard_bytes
        Maximum file size; a larger tensor gets its own file.
    progress
        Called with the number of bytes read since the last call.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    ValueError
        If ``out`` has another suffix, a file exists, or a value overflows the dtype.
    CorruptCheckpointError
        If a file of the checkpoint is damaged.
    """
    if out.suffix != SUFFIX or not out.parent.is_dir():
        raise ValueError(f"--out: got {out}; expected a file {SUFFIX} in an existing folder")
    shards = _shards(tensors, max_shard_bytes)
    paths = [_shard_path(out, number, len(shards)) for number in range(1, len(shards) + 1)]
    index = out.with_name(f"{out.name}.index.json")
    _check_absent([out, index, *paths])
    about = {
        **{name: repr(value) for name, value in checkpoint.manifest.metrics.items()},
        "format": "np",
        "step": str(checkpoint.step),
    }
    with _NewFiles() as files:
        for path, shard in zip(paths, shards, strict=True):
            _write_shard(checkpoint, shard, files.temporary(path), about, progress)
        if len(shards) > 1:
            with _durable(files.temporary(index)) as file:
                file.write(_index([path.name for path in paths], shards))
            paths.append(index)
        files.rename_all()
    return paths


class _NewFiles(contextlib.AbstractContextManager["_NewFiles"]):
    """Files that are renamed together, or all deleted when the context ends."""

    def __init__(self) -> None:
        self._temporary: dict[Path, Path] = {}
        self._placed: list[Path] = []

    def temporary(self, path: Path) -> Path:
        """Return the temporary path of a file that becomes ``path``."""
        remove_abandoned(path)
        self._temporary[path] = temporary_name(path)
        return self._temporary[path]

    def rename_all(self) -> None:
        """Rename the temporary files in the order of their creation."""
        _check_absent([*self._temporary])
        for path, temporary in self._temporary.items():
            temporary.rename(path)
            self._placed.append(path)
        for folder in {path.parent for path in self._placed}:
            fsync_path(folder)
        self._temporary.clear()

    def __exit__(self, *error: object) -> None:
        for path in [*self._temporary.values(), *(self._placed if self._temporary else ())]:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    with path.open("xb") as file:
        hold(file.fileno())
        yield file
        file.flush()
        os.fsync(file.fileno())


def _write_shard(
    checkpoint: Checkpoint,
    shard: Sequence[ExportedTensor],
    path: Path,
    about: Mapping[str, str],
    progress: Callable[[int], None],
) -> None:
    # In this order each tensor starts at a multiple of its element size, which readers require.
    ordered = sorted(
        shard,
        key=lambda tensor: (
            tensor.spec.size_bytes % _ALIGNMENT != 0,
            -np.dtype(tensor.spec.dtype).itemsize,
        ),
    )
    with _durable(path) as file:
        file.write(render_header([(tensor.name, tensor.spec) for tensor in ordered], about))
        for tensor in ordered:
            array = checkpoint.leaf(tensor.key)
            for chunk in chunks(as_bytes(converted(tensor, array))):
                file.write(chunk)
            progress(array.nbytes)


def converted(tensor: ExportedTensor, array: np.ndarray) -> np.ndarray:
    """Return an array in the dtype of its export; raises ValueError if a value overflows."""
    dtype = np.dtype(tensor.spec.dtype)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if np.count_nonzero(np.isfinite(converted)) != np.count_nonzero(np.isfinite(array)):
        raise ValueError(
            f"--dtype: got {dtype.name}, in which values of {tensor.key} overflow; use bfloat16 or "
            "float32, which reach 3e38"
        )
    return converted


def _shards(tensors: Sequence[ExportedTensor], max_bytes: int) -> list[list[ExportedTensor]]:
    shards: list[list[ExportedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.spec.size_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.spec.size_bytes
    return shards


def _shard_path(out: Path, number: int, count: int) -> Path:
    return out if count == 1 else out.with_stem(f"{out.stem}-{number:05}-of-{count:05}")


def _index(names: Sequence[str], shards: Sequence[Sequence[ExportedTensor]]) -> bytes:
    tensors = [tensor for shard in shards for tensor in shard]
    content = {
        "metadata": {"total_size": sum(tensor.spec.size_bytes for tensor in tensors)},
        "weight_map": {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        },
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _check_absent(paths: Sequence[Path]) -> None:
    taken = [str(path) for path in dict.fromkeys(paths) if path.exists()]
    if taken:
        raise ValueError(f"--out: {', '.join(taken)} exists; delete it or choose another --out")


def _check_unique(tensors: Sequence[ExportedTensor], separator: str) -> None:
    keys: dict[str, str] = {}
    for tensor in tensors:
        if other := keys.get(tensor.name):
            raise ValueError(
                f"--separator: got {separator!r}, with which {other} and {tensor.key} are both "
                f"named {tensor.name}; choose another"
            )
        keys[tensor.name] = tensor.key
