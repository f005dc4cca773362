"""Shapes and dtypes of the leaves of a state, and differences between two states."""

from collections.abc import Mapping
from typing import NamedTuple

# ml_dtypes teaches NumPy the names "bfloat16" and "float8_*".
import ml_dtypes
import numpy as np


class LeafSpec(NamedTuple):
    """Shape and NumPy dtype name of a leaf."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Size of the leaf in bytes; computed in Python integers, which do not overflow."""
        size = np.dtype(self.dtype).itemsize
        for length in self.shape:
            size *= length
        return size


def is_float(dtype: str) -> bool:
    """Return whether a dtype is a floating-point type, including those of ml_dtypes."""
    try:
        ml_dtypes.finfo(np.dtype(dtype))  # type: ignore[no-untyped-call]  # ml_dtypes gives no types
    except ValueError:
        return False
    return True


def is_number(dtype: str) -> bool:
    """Return whether a dtype is numeric or boolean, including those of ml_dtypes."""
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
    """Return a line for each key, shape or dtype in which two states differ.

    Parameters
    ----------
    wanted, saved : mapping of str to LeafSpec
        The requested leaves and those of the checkpoint.
    partial : bool
        Whether leaves of the checkpoint may be missing in the request.
    cast : bool
        Whether two floating-point dtypes may differ.

    Returns
    -------
    list of str
        Empty if the states fit.

    Examples
    --------
    >>> differences({"w": LeafSpec((2,), "float32")}, {"w": LeafSpec((3,), "float32")})
    ['w: requested shape (2,), saved (3,)']
    >>> differences({"w": LeafSpec((2,), "bfloat16")}, {"w": LeafSpec((2,), "float32")}, cast=True)
    []
    """
    lines: list[str] = []
    for key in sorted(wanted.keys() | saved.keys()):
        if key not in saved:
            lines.append(f"{key}: requested, not saved")
        elif key not in wanted:
            if not partial:
                lines.append(f"{key}: saved, not requested")
        else:
            want, have = wanted[key], saved[key]
            if want.shape != have.shape:
                lines.append(f"{key}: requested shape {want.shape}, saved {have.shape}")
            castable = cast and is_float(want.dtype) and is_float(have.dtype)
            if want.dtype != have.dtype and not castable:
                lines.append(f"{key}: requested dtype {want.dtype}, saved {have.dtype}")
    return lines
