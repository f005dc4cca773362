"""Manifest of a checkpoint: its content and checksums of every byte of its files.

The manifest lists every file with its size, and every piece of an array with its position and xxh3
checksum, and contains a checksum of its own text. The checksums detect accidental damage, not
forgery, since a forger can also replace the manifest.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tjx_ckpt.errors import StorageError
from tjx_ckpt.leaf_spec import LeafSpec, is_number
from tjx_ckpt.store.checksum import checksum
from tjx_ckpt.store.storage import Storage, WrongFileError
from tjx_ckpt.store.tensor_file import Piece, StoredPiece, TensorFile

MANIFEST_NAME = "manifest.json"
_ORBAX_METADATA_NAME = "_CHECKPOINT_METADATA"  # Orbax writes it into the folder of each step
_FORMAT = "tjx-ckpt/2"
# 100,000 pieces of arrays take about 15 MB as text and ten times as much as Python objects.
_MAX_BYTES = 64 << 20
_MAX_DIMENSIONS = 32
_MAX_ARRAY_BYTES = 1 << 50
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class ManifestError(Exception):
    """The manifest is missing, damaged or has an unknown format."""


@dataclass(frozen=True)
class Manifest:
    """Content of a checkpoint.

    Attributes
    ----------
    step
        The saved step.
    metadata, metrics
        Arguments of ``save``.
    versions
        Versions of the packages that wrote the checkpoint.
    leaves
        Shape and dtype of each leaf of the state.
    files
        Array files by name.
    """

    step: int
    metadata: dict[str, Any]
    metrics: dict[str, float]
    versions: dict[str, str]
    leaves: dict[str, LeafSpec]
    files: dict[str, TensorFile]

    @property
    def size_bytes(self) -> int:
        """Total size of the array files."""
        return sum(file.size for file in self.files.values())


def plain_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata as it is read back from JSON.

    Raises
    ------
    ValueError
        If it is not JSON-serializable.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata: got {error}; expected plain JSON (str, number, list, dict)"
        ) from None
    return copy


def render(manifest: Manifest) -> bytes:
    """Serialize a manifest, with its own checksum."""
    content = {
        "format": _FORMAT,
        "step": manifest.step,
        "metadata": manifest.metadata,
        # As text, since JSON has no NaN.
        "metrics": {name: repr(float(value)) for name, value in manifest.metrics.items()},
        "versions": manifest.versions,
        "leaves": manifest.leaves,
        "files": {name: file_to_json(file) for name, file in manifest.files.items()},
    }
    return with_checksum(content)


def read(storage: Storage, step: int) -> Manifest:
    """Read and verify the manifest of a step.

    Raises
    ------
    ManifestError
        If it is missing, damaged, of an unknown format, or belongs to another step.
    UnreadableError
        If it cannot be read now.
    """
    try:
        with storage.open(step, MANIFEST_NAME) as file:
            if file.size > _MAX_BYTES:
                raise ManifestError(f"has {file.size} bytes, more than {_MAX_BYTES}")
            text = bytearray(file.size)
            file.read_into(0, memoryview(text))
    except FileNotFoundError:
        hint = "; it is a checkpoint of Orbax: use Checkpointer(..., format='orbax')"
        raise ManifestError(f"missing{hint if is_orbax(storage, step) else ''}") from None
    except WrongFileError as error:
        raise ManifestError(f"unreadable ({error})") from None
    manifest = parse(bytes(text))
    if manifest.step != step:
        raise ManifestError(f"belongs to step {manifest.step}")
    return manifest


def is_orbax(storage: Storage, step: int) -> bool:
    """Return whether Orbax wrote the checkpoint of a step; False if that cannot be read now."""
    try:
        with storage.open(step, _ORBAX_METADATA_NAME):
            return True
    except (OSError, StorageError):
        return False


def parse(text: bytes) -> Manifest:
    """Parse and verify the text of a manifest.

    Raises
    ------
    ManifestError
        If the text was changed or has an unknown format.
    """
    content = without_checksum(text)
    try:
        if content["format"] != _FORMAT:
            raise ManifestError(f"format {content['format']!r} is unknown; this is {_FORMAT!r}")
        manifest = Manifest(
            step=_count(content["step"]),
            metadata=dict(content["metadata"]),
            metrics={str(name): float(value) for name, value in content["metrics"].items()},
            versions={str(name): str(value) for name, value in content["versions"].items()},
            leaves={
                str(key): LeafSpec(_counts(shape), str(dtype))
                for key, (shape, dtype) in content["leaves"].items()
            },
            files={
                _file_name(name): file_from_json(file) for name, file in content["files"].items()
            },
        )
        _check_pieces(manifest)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ManifestError(f"unreadable ({type(error).__name__}: {error})") from None
    return manifest


def with_checksum(content: Any) -> bytes:
    """Serialize a value as JSON with a checksum of the text."""
    body = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return f'{{"checksum": "{checksum(body.encode())}", "content": {body}}}\n'.encode()


def without_checksum(text: bytes) -> Any:
    """Parse the result of `with_checksum`.

    Raises
    ------
    ManifestError
        If any byte was changed.
    """
    try:
        content = json.loads(text.decode("utf-8"))["content"]
        # Serializing again detects changes of any byte, also outside of the content.
        unchanged = with_checksum(content) == text
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ManifestError(f"unreadable ({type(error).__name__})") from None
    if not unchanged:
        raise ManifestError("checksum differs")
    return content


def file_to_json(file: TensorFile) -> dict[str, Any]:
    """Return the entry of a file; offsets of pieces follow from their sizes."""
    return {
        "header": [file.header_size, file.header_xxh3_128],
        "pieces": [
            [stored.piece.key, stored.piece.start, stored.piece.shape, stored.size, stored.xxh3_128]
            for stored in file.pieces
        ],
    }


def file_from_json(entry: Any) -> TensorFile:
    """Parse the entry of a file; raise TypeError, ValueError or KeyError if it is invalid."""
    header_size, header_xxh3_128 = entry["header"]
    position = _count(header_size)
    pieces = []
    for key, start, shape, size, xxh3_128 in entry["pieces"]:
        piece = Piece(str(key), _counts(start), _counts(shape))
        pieces.append(StoredPiece(piece, position, _count(size), str(xxh3_128)))
        position += _count(size)
    return TensorFile(position, _count(header_size), str(header_xxh3_128), tuple(pieces))


def _check_pieces(manifest: Manifest) -> None:
    """Check that leaves have possible shapes and that pieces cover them exactly."""
    pieces: dict[str, list[Piece]] = {key: [] for key in manifest.leaves}
    itemsizes = {key: _itemsize(leaf.dtype) for key, leaf in manifest.leaves.items()}
    for file in manifest.files.values():
        for stored in file.pieces:
            key = stored.piece.key
            pieces[key].append(stored.piece)
            if stored.size != math.prod(stored.piece.shape) * itemsizes[key]:
                raise ValueError(f"{key}: a piece of {stored.size} bytes does not fit its shape")
    for key, leaf in manifest.leaves.items():
        if len(leaf.shape) > _MAX_DIMENSIONS or any(size > _MAX_ARRAY_BYTES for size in leaf.shape):
            raise ValueError(f"{key}: impossible shape {leaf.shape}")
        if leaf.size_bytes > _MAX_ARRAY_BYTES:
            raise ValueError(f"{key}: impossible size of {leaf.size_bytes} bytes")
        if 0 not in leaf.shape or pieces[key]:
            _check_grid(key, leaf.shape, pieces[key])


def _check_grid(key: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> None:
    """Check that pieces are all boxes of a grid, as those of a sharding are."""
    if any(len(piece.start) != len(shape) or len(piece.shape) != len(shape) for piece in pieces):
        raise ValueError(f"{key}: a piece has another number of dimensions than the leaf")
    expected = 1
    for axis, length in enumerate(shape):
        position, cuts = 0, sorted({(p.start[axis], p.shape[axis]) for p in pieces})
        for start, size in cuts:
            if start != position or not size:
                raise ValueError(f"{key}: the pieces overlap or leave a gap along axis {axis}")
            position += size
        if position != length:
            raise ValueError(f"{key}: the pieces do not cover axis {axis}")
        expected *= len(cuts)
    if not len(set(pieces)) == len(pieces) == expected:
        raise ValueError(f"{key}: {len(pieces)} pieces instead of {expected}")


def _itemsize(dtype: str) -> int:
    """Return the size in bytes of a numeric dtype; raise ValueError for others."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise ValueError(f"{dtype!r} is not a numeric dtype") from None
    if found.name != dtype or not is_number(dtype):
        raise ValueError(f"{dtype!r} is not a numeric dtype")
    return found.itemsize


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    return tuple(_count(value) for value in values)


def _file_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a file name")
    return name
