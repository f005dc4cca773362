"""Safetensors files with pieces of arrays, readable by any reader of that format.

Layout: the length of the header in 8 bytes, a JSON header, and the pieces without gaps. The header
is padded with spaces so that the first piece starts at a multiple of 64 bytes, and so does each
later one whose predecessors have sizes that are multiples of 64 bytes.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tjx_ckpt.leaf_spec import LeafSpec
from tjx_ckpt.store.checksum import Digest, checksum, chunks

_ALIGNMENT = 64
_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
"""Safetensors dtype by NumPy dtype name. Others are stored as bytes [..., itemsize]."""


class Piece(NamedTuple):
    """A box of a leaf: its start indices and its shape."""

    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]

    def name(self, leaf_shape: tuple[int, ...]) -> str:
        """Return the key, followed by the box if it is not the whole leaf: ``w[0:4,8:16]``."""
        if self.shape == leaf_shape:
            return self.key
        box = (
            f"{first}:{first + size}" for first, size in zip(self.start, self.shape, strict=True)
        )
        return f"{self.key}[{','.join(box)}]"


class StoredPiece(NamedTuple):
    """A piece with its offset and size in a file in bytes, and its xxh3-128 checksum."""

    piece: Piece
    offset: int
    size: int
    xxh3_128: str


class TensorFile(NamedTuple):
    """Layout and checksums of a file; header and pieces cover every byte.

    Attributes
    ----------
    size
        Size of the file in bytes.
    header_size
        Offset of the first piece.
    header_xxh3_128
        Checksum of the bytes before the first piece.
    pieces
        Pieces in the order of the file.
    """

    size: int
    header_size: int
    header_xxh3_128: str
    pieces: tuple[StoredPiece, ...]


def write(
    file_write: Callable[[Any], object],
    pieces: Sequence[tuple[str, Piece, np.ndarray]],
) -> TensorFile:
    """Write arrays to a file and compute their checksums.

    Parameters
    ----------
    file_write
        Appends bytes to the file.
    pieces
        Name in the header, box and content of each piece.

    Returns
    -------
    TensorFile
        Layout and checksums of the file.
    """
    # Sizes that are multiples of the alignment first, so that these pieces are aligned.
    ordered = sorted(pieces, key=lambda item: (item[2].nbytes % _ALIGNMENT != 0, item[0]))
    header = render_header(
        [(name, LeafSpec(array.shape, array.dtype.name)) for name, _, array in ordered]
    )
    file_write(header)
    position = len(header)
    stored = []
    for _, piece, array in ordered:
        digest = Digest()
        for chunk in chunks(as_bytes(array)):
            file_write(chunk)
            digest.update(chunk)
        stored.append(StoredPiece(piece, position, array.nbytes, digest.hexdigest()))
        position += array.nbytes
    return TensorFile(position, len(header), checksum(header), tuple(stored))


def as_bytes(array: np.ndarray) -> memoryview:
    """Return the row-major bytes of an array; a copy only if it is not row-major."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return memoryview(flat.view(np.uint8).data)


def is_known(dtype: str) -> bool:
    """Return whether safetensors has a dtype; others are stored as bytes."""
    return dtype in _CODES


def render_header(
    tensors: Sequence[tuple[str, LeafSpec]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Serialize the header of a file: all bytes before the first tensor.

    Parameters
    ----------
    tensors
        Name, shape and dtype of each tensor, in the order of the file.
    metadata
        Metadata of the file.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, spec in tensors:
        code = _CODES.get(spec.dtype)
        shape = spec.shape if code else (*spec.shape, np.dtype(spec.dtype).itemsize)
        end = position + spec.size_bytes
        entries[name] = {
            "dtype": code or "U8",
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
