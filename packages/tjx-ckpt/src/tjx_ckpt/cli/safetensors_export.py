"""A checkpoint as safetensors files that other programs read: whole tensors under plain names."""

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

SUFFIX = ".safetensors"
# Readers may demand that a tensor starts at a multiple of this, and of its elements' size.
_ALIGNMENT = 64


class Tensor(NamedTuple):
    """A tensor to write: its name in the file, the leaf that it is, its shape and dtype there."""

    name: str
    key: str
    spec: LeafSpec


def plan_tensors(
    leaves: Mapping[str, LeafSpec], *, only: str, dtype: str | None, separator: str
) -> list[Tensor]:
    """Return the tensors that an export holds, in the order of their keys.

    Parameters
    ----------
    leaves
        What the checkpoint holds.
    only
        Take what is at or below this key, and leave the key out of the names.
    dtype
        Convert floating-point leaves to this; None leaves them as they are.
    separator
        Between the parts of a name.

    Raises
    ------
    ValueError
        If nothing is there, two names are the same, or safetensors does not know a dtype.
    """
    prefix = only.strip("/")
    tensors = []
    for key in below(leaves, prefix):
        parts = key.split("/")
        kept = parts[prefix.count("/") + 1 :] if prefix else parts
        saved = leaves[key]
        spec = LeafSpec(saved.shape, dtype if dtype and is_float(saved.dtype) else saved.dtype)
        if not is_known(spec.dtype):
            raise ValueError(
                f"{key} has dtype {spec.dtype}, which safetensors does not have: "
                "leave it out with --only, or give --dtype if it is a floating-point type"
            )
        tensors.append(Tensor(separator.join(kept or parts[-1:]), key, spec))
    _refuse_doubles(tensors, separator)
    return tensors


def export(
    checkpoint: Checkpoint,
    tensors: Sequence[Tensor],
    out: Path,
    *,
    max_shard_bytes: int,
    progress: Callable[[int], None],
) -> list[Path]:
    """Write tensors to new files, one tensor in memory at a time; either all of them or none.

    Parameters
    ----------
    checkpoint
        Each byte that is read of it is checked.
    tensors
        What to write.
    out
        ``model.safetensors``. If the tensors have more than ``max_shard_bytes``, the files are
        ``model-00001-of-00003.safetensors``, ... and ``model.safetensors.index.json``.
    max_shard_bytes
        A larger tensor has a file of its own.
    progress
        Is told how many bytes more were read.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    ValueError
        If ``out`` has another suffix, a file is there already, or a value is too large for the
        dtype.
    CorruptCheckpointError
        If a file of the checkpoint is damaged.
    """
    if out.suffix != SUFFIX or not out.parent.is_dir():
        raise ValueError(f"--out {out}: must be a file {SUFFIX} in a folder that is there")
    shards = _shards(tensors, max_shard_bytes)
    paths = [_shard_path(out, number, len(shards)) for number in range(1, len(shards) + 1)]
    index = out.with_name(f"{out.name}.index.json")
    _refuse_taken([out, index, *paths])
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
        files.place()
    return paths


class _NewFiles(contextlib.AbstractContextManager["_NewFiles"]):
    """Files that get their names together, or are all gone when the context ends."""

    def __init__(self) -> None:
        self._temporary: dict[Path, Path] = {}
        self._placed: list[Path] = []

    def temporary(self, path: Path) -> Path:
        """Return where to write what will be ``path``."""
        remove_abandoned(path)
        self._temporary[path] = temporary_name(path)
        return self._temporary[path]

    def place(self) -> None:
        """Give the files, in the order in which they were begun, their names."""
        _refuse_taken([*self._temporary])
        for path, temporary in self._temporary.items():
            temporary.rename(path)
            self._placed.append(path)
        for folder in {path.parent for path in self._placed}:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
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
    shard: Sequence[Tensor],
    path: Path,
    about: Mapping[str, str],
    progress: Callable[[int], None],
) -> None:
    # So each starts at a multiple of its elements' size, as readers may demand.
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
            for chunk in chunks(as_bytes(_converted(tensor, array))):
                file.write(chunk)
            progress(array.nbytes)


def _converted(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    dtype = np.dtype(tensor.spec.dtype)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if np.count_nonzero(np.isfinite(converted)) != np.count_nonzero(np.isfinite(array)):
        raise ValueError(
            f"--dtype {dtype.name}: {tensor.key} has values that are too large for it; "
            "bfloat16 and float32 reach to 3e38"
        )
    return converted


def _shards(tensors: Sequence[Tensor], max_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
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


def _index(names: Sequence[str], shards: Sequence[Sequence[Tensor]]) -> bytes:
    tensors = [tensor for shard in shards for tensor in shard]
    content = {
        "metadata": {"total_size": sum(tensor.spec.size_bytes for tensor in tensors)},
        "weight_map": {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        },
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _refuse_taken(paths: Sequence[Path]) -> None:
    taken = [str(path) for path in dict.fromkeys(paths) if path.exists()]
    if taken:
        raise ValueError(f"{', '.join(taken)}: there already; delete it or give another --out")


def _refuse_doubles(tensors: Sequence[Tensor], separator: str) -> None:
    keys: dict[str, str] = {}
    for tensor in tensors:
        if other := keys.get(tensor.name):
            raise ValueError(
                f"{other} and {tensor.key} would both be named {tensor.name}: "
                f"give another --separator than {separator!r}"
            )
        keys[tensor.name] = tensor.key
