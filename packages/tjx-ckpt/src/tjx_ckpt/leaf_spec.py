"""What a state holds: shape and dtype of each leaf, and how two such tables differ."""

from collections.abc import Mapping
from typing import NamedTuple

# ml_dtypes teaches NumPy the names "bfloat16" and "float8_*".
import ml_dtypes
import numpy as np


class LeafSpec(NamedTuple):
    """Shape and dtype of one leaf."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Size of the leaf in bytes; exact for any shape, however absurd."""
        size = np.dtype(self.dtype).itemsize
        for length in self.shape:
            size *= length
        return size


def is_float(dtype: str) -> bool:
    """Tell whether a dtype is a floating-point type, those of ml_dtypes included."""
    try:
        ml_dtypes.finfo(np.dtype(dtype))  # type: ignore[no-untyped-call]  # ml_dtypes gives no types
    except ValueError:
        return False
    return True


def is_number(dtype: str) -> bool:
    """Tell whether a dtype is a type of numbers or truth values, those of ml_dtypes included."""
    if np.dtype(dtype).kind in "biufc" or is_float(dtype):
        return True
    try:
        ml_dtypes.iinfo(np.dtype(dtype))  # type: ignore[no-untyped-call]  # ml_dtypes gives no types
    except ValueError:
        return False
    return True


def differences(
    wanted: Mapping[str, LeafSpec],
    saved: Mapping[str, LeafSpec],
    *,
    partial: bool = False,
    cast: bool = False,
) -> list[str]:
    """Return one line for each key, shape or dtype in which two tables differ.

    Parameters
    ----------
    wanted, saved
        What was asked for and what is there.
    partial
        Whether what is there and was not asked for is no difference.
    cast
        Whether two floating-point types are no difference.

    Examples
    --------
    >>> differences({"w": LeafSpec((2,), "float32")}, {"w": LeafSpec((3,), "float32")})
    ['w: shape (2,) was asked for, the checkpoint has (3,)']
    >>> differences({"w": LeafSpec((2,), "bfloat16")}, {"w": LeafSpec((2,), "float32")}, cast=True)
    []
    """
    lines: list[str] = []
    for key in sorted(wanted.keys() | saved.keys()):
        if key not in saved:
            lines.append(f"{key}: was asked for, the checkpoint does not have it")
        elif key not in wanted:
            if not partial:
                lines.append(f"{key}: was not asked for, the checkpoint has it")
        else:
            want, have = wanted[key], saved[key]
            if want.shape != have.shape:
                lines.append(
                    f"{key}: shape {want.shape} was asked for, the checkpoint has {have.shape}"
                )
            castable = cast and is_float(want.dtype) and is_float(have.dtype)
            if want.dtype != have.dtype and not castable:
                lines.append(
                    f"{key}: dtype {want.dtype} was asked for, the checkpoint has {have.dtype}"
                )
    return lines
