"""The manifest of a checkpoint: what it holds, and a checksum of every byte of its files.

Files do not notice a flipped bit. The manifest does: it lists every file with its size, every piece
of an array in it with its place and xxh3 checksum, and carries a checksum of its own text. The
checksums find accidents, not forgery: whoever can write the folder can write the manifest.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tjx_ckpt.leaf_spec import LeafSpec, is_number
from tjx_ckpt.store.checksum import checksum
from tjx_ckpt.store.storage import Storage, WrongFileError
from tjx_ckpt.store.tensor_file import Piece, StoredPiece, TensorFile

MANIFEST_NAME = "manifest.json"
_FORMAT = "tjx-ckpt/2"
# 100,000 pieces of arrays take about 15 MB. Python's objects of it take some ten times as much.
_MOST_BYTES = 64 << 20
_MOST_DIMENSIONS = 32
_MOST_BYTES_OF_ALL = 1 << 50
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class ManifestError(Exception):
    """The manifest is missing, damaged or of an unknown format."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes
    ----------
    step
        The training step that was saved.
    metadata
        What the caller gave to ``save``: any JSON.
    metrics
        What the caller measured at this step.
    versions
        Versions of the packages that wrote it.
    leaves
        Shape and dtype of each leaf of the state.
    files
        The files of arrays, by name.
    """

    step: int
    metadata: dict[str, Any]
    metrics: dict[str, float]
    versions: dict[str, str]
    leaves: dict[str, LeafSpec]
    files: dict[str, TensorFile]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files of arrays."""
        return sum(file.size for file in self.files.values())


def plain_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``metadata`` exactly as it will read back from JSON.

    Raises
    ------
    ValueError
        If it holds something that JSON cannot express.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata must be plain JSON (str, number, list, dict): {error}"
        ) from None
    return copy


def render(manifest: Manifest) -> bytes:
    """Return the text of a manifest, with its own checksum."""
    content = {
        "format": _FORMAT,
        "step": manifest.step,
        "metadata": manifest.metadata,
        # As text: JSON knows no NaN, and a metric may be one.
        "metrics": {name: repr(float(value)) for name, value in manifest.metrics.items()},
        "versions": manifest.versions,
        "leaves": manifest.leaves,
        "files": {name: file_to_json(file) for name, file in manifest.files.items()},
    }
    return sealed(content)


def read(storage: Storage, step: int) -> Manifest:
    """Read the manifest of a step and check it against its own checksum.

    Raises
    ------
    ManifestError
        If it is missing, damaged, of an unknown format, or another step's.
    UnreadableError
        If it cannot be read now.
    """
    try:
        with storage.open(step, MANIFEST_NAME) as file:
            if file.size > _MOST_BYTES:
                raise ManifestError(f"has {file.size} bytes, more than {_MOST_BYTES}")
            text = bytearray(file.size)
            file.read_into(0, memoryview(text))
    except FileNotFoundError:
        raise ManifestError("missing") from None
    except WrongFileError as error:
        raise ManifestError(f"unreadable ({error})") from None
    manifest = parse(bytes(text))
    if manifest.step != step:
        raise ManifestError(f"belongs to step {manifest.step}")
    return manifest


def parse(text: bytes) -> Manifest:
    """Return the manifest that a text holds.

    Raises
    ------
    ManifestError
        If the text is not one of this format, unchanged.
    """
    content = unsealed(text)
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


def sealed(content: Any) -> bytes:
    """Return JSON with a checksum of its own text."""
    body = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return f'{{"checksum": "{checksum(body.encode())}", "content": {body}}}\n'.encode()


def unsealed(text: bytes) -> Any:
    """Return the content of what `sealed` gave.

    Raises
    ------
    ManifestError
        If any byte of it was changed.
    """
    try:
        content = json.loads(text.decode("utf-8"))["content"]
        # Rendering anew finds any changed byte: in the content, in the checksum, between them.
        unchanged = sealed(content) == text
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ManifestError(f"unreadable ({type(error).__name__})") from None
    if not unchanged:
        raise ManifestError("checksum differs")
    return content


def file_to_json(file: TensorFile) -> dict[str, Any]:
    """Return a file's entry; the offsets of its pieces follow from their sizes."""
    return {
        "header": [file.header_size, file.header_xxh3_128],
        "pieces": [
            [stored.piece.key, stored.piece.start, stored.piece.shape, stored.size, stored.xxh3_128]
            for stored in file.pieces
        ],
    }


def file_from_json(entry: Any) -> TensorFile:
    """Return the file that an entry describes; a TypeError, ValueError or KeyError if none."""
    header_size, header_xxh3_128 = entry["header"]
    position = _count(header_size)
    pieces = []
    for key, start, shape, size, xxh3_128 in entry["pieces"]:
        piece = Piece(str(key), _counts(start), _counts(shape))
        pieces.append(StoredPiece(piece, position, _count(size), str(xxh3_128)))
        position += _count(size)
    return TensorFile(position, _count(header_size), str(header_xxh3_128), tuple(pieces))


def _check_pieces(manifest: Manifest) -> None:
    """Refuse leaves that no array can be, and pieces that do not make up the leaves exactly."""
    pieces: dict[str, list[Piece]] = {key: [] for key in manifest.leaves}
    itemsizes = {key: _itemsize(leaf.dtype) for key, leaf in manifest.leaves.items()}
    for file in manifest.files.values():
        for stored in file.pieces:
            key = stored.piece.key
            pieces[key].append(stored.piece)
            if stored.size != math.prod(stored.piece.shape) * itemsizes[key]:
                raise ValueError(f"{key}: a piece of {stored.size} bytes has not its shape's size")
    for key, leaf in manifest.leaves.items():
        if len(leaf.shape) > _MOST_DIMENSIONS or any(
            size > _MOST_BYTES_OF_ALL for size in leaf.shape
        ):
            raise ValueError(f"{key}: no array has the shape {leaf.shape}")
        if leaf.size_bytes > _MOST_BYTES_OF_ALL:
            raise ValueError(f"{key}: {leaf.size_bytes} bytes, more than an array can have")
        if 0 not in leaf.shape or pieces[key]:
            _check_grid(key, leaf.shape, pieces[key])


def _check_grid(key: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> None:
    """Refuse pieces that are not all the boxes of a grid, as those of a sharding are."""
    if any(len(piece.start) != len(shape) or len(piece.shape) != len(shape) for piece in pieces):
        raise ValueError(f"{key}: a piece has not the leaf's dimensions")
    expected = 1
    for axis, length in enumerate(shape):
        position, cuts = 0, sorted({(p.start[axis], p.shape[axis]) for p in pieces})
        for start, size in cuts:
            if start != position or not size:
                raise ValueError(f"{key}: the pieces overlap or leave a gap along axis {axis}")
            position += size
        if position != length:
            raise ValueError(f"{key}: the pieces do not make up axis {axis}")
        expected *= len(cuts)
    if not len(set(pieces)) == len(pieces) == expected:
        raise ValueError(f"{key}: {len(pieces)} pieces are there, {expected} make up the leaf")


def _itemsize(dtype: str) -> int:
    """Return the bytes of a number; a ValueError for what is no type of numbers."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise ValueError(f"{dtype!r} is no type of numbers") from None
    if found.name != dtype or not is_number(dtype):
        raise ValueError(f"{dtype!r} is no type of numbers")
    return found.itemsize


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    return tuple(_count(value) for value in values)


def _file_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a file in the checkpoint's folder")
    return name
