"""Writer of GGUF files, the container of llama.cpp: typed metadata, and tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, Literal, NamedTuple, get_args

import numpy as np

Dtype = Literal["f32", "f16", "q8_0"]
Value = bool | int | float | str | Sequence[int] | Sequence[str]

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
BLOCK = 32
"""Elements of a row that share a scale in q8_0."""

# Numbers of the types of metadata: uint32, int32, float32, bool, string, array.
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_TENSOR_TYPES: dict[Dtype, int] = {"f32": 0, "f16": 1, "q8_0": 8}
_ELEMENTS: dict[Dtype, np.dtype] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "q8_0": np.dtype([("scale", "<f2"), ("values", "i1", BLOCK)]),
}
_CHUNK = BLOCK << 17  # elements converted at once


class Tensor(NamedTuple):
    """Shape, with the contiguous axis last, and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of the values."""
        elements = math.prod(self.shape) // (BLOCK if self.dtype == "q8_0" else 1)
        return elements * _ELEMENTS[self.dtype].itemsize


def write_gguf(
    file: BinaryIO,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, Tensor],
    read: Callable[[str], np.ndarray],
) -> None:
    """Write a GGUF file, a tensor at a time.

    Parameters
    ----------
    file : BinaryIO
        Empty file.
    metadata : Mapping
        Values by key: integers are stored as uint32, those of a sequence as int32, numbers with a
        fraction as float32.
    tensors : Mapping
        The tensors by name, in the order of the file.
    read : callable
        From a name to the float32 values of the tensor; called once for each.

    Raises
    ------
    ValueError
        If a value is not finite or overflows the dtype of its tensor.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import io
    >>> file = io.BytesIO()
    >>> write_gguf(file, {"a": 1}, {"x": Tensor((2, 3), "f16")}, lambda _: np.ones((2, 3)))
    >>> file.getvalue()[:4], len(file.getvalue()) % ALIGNMENT
    (b'GGUF', 0)
    """
    file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        file.write(_string(key) + _typed(value))
    offset = 0
    for name, (shape, dtype) in tensors.items():
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        file.write(_string(name) + axes + struct.pack("<IQ", _TENSOR_TYPES[dtype], offset))
        offset += -(-tensors[name].size_bytes // ALIGNMENT) * ALIGNMENT
    _pad(file)
    for name, (shape, dtype) in tensors.items():
        array = read(name)
        assert array.shape == shape, (name, array.shape, shape)
        flat = np.ascontiguousarray(array, np.float32).reshape(-1)
        if not np.isfinite(flat).all():
            raise ValueError(
                f"tensor {name}: got {np.sum(~np.isfinite(flat))} values that are infinite or NaN; "
                "expected finite ones; export an earlier checkpoint"
            )
        for start in range(0, len(flat), _CHUNK):
            try:
                file.write(encode(flat[start : start + _CHUNK], dtype).data)
            except FloatingPointError as error:
                raise ValueError(
                    f"tensor {name}: got values up to {np.abs(array).max():.3g}, which {dtype} "
                    "cannot represent; expected finite ones in its range; export as f32"
                ) from error
        _pad(file)


def encode(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Convert values to the elements of a dtype.

    q8_0 has blocks of 32 values: int8 multiples of a float16 scale, the largest magnitude / 127.

    Parameters
    ----------
    values : float32 [N]
        Finite values; N is a multiple of 32 for q8_0.
    dtype : {"f32", "f16", "q8_0"}
        The dtype.

    Returns
    -------
    array [N], or structured array [N / 32]
        The elements, little-endian.

    Raises
    ------
    FloatingPointError
        If a value, or the scale of a block, overflows float16.

    Examples
    --------
    >>> block = encode(np.linspace(-127, 127, 32, dtype=np.float32), "q8_0")
    >>> float(block["scale"][0]), int(block["values"][0, 0])
    (1.0, -127)
    """
    with np.errstate(over="raise", invalid="raise"):
        if dtype != "q8_0":
            return values.astype(_ELEMENTS[dtype], copy=False)
        blocks = values.reshape(-1, BLOCK)
        scales = np.abs(blocks).max(-1) / 127
        inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
        elements = np.empty(len(blocks), _ELEMENTS[dtype])
        elements["scale"] = scales
        elements["values"] = np.rint(blocks * inverse[:, None])
    return elements


def _typed(value: Value) -> bytes:
    """Return the type and the content of a value of metadata."""
    match value:
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _UINT32, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
        case str():
            return struct.pack("<I", _STRING) + _string(value)
    of_text = all(isinstance(item, str) for item in value)
    head = struct.pack("<IIQ", _ARRAY, _STRING if of_text else _INT32, len(value))
    if of_text:
        return head + b"".join(_string(str(item)) for item in value)
    return head + np.asarray(value, "<i4").tobytes()


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
