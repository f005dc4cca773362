"""Numeric differences between arrays of two checkpoints, two arrays in memory at a time."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tjx_ckpt.leaf_spec import LeafSpec, is_float
from tjx_ckpt.lookup import Checkpoint

# Elements converted to float64 at a time.
_CHUNK = 1 << 20


class Change(NamedTuple):
    """Difference of two arrays of the same shape. All sums are in float64.

    Attributes
    ----------
    squares, other_squares
        Sums of squares of the two arrays.
    difference_squares
        Sum of squares of the difference. Equal infinities and pairs of NaN count as equal.
    largest
        Largest absolute difference; an exact int if both have the same integer dtype.
    equal
        Whether they have the same dtype and bits.
    """

    squares: float = 0.0
    other_squares: float = 0.0
    difference_squares: float = 0.0
    largest: float | int = 0
    equal: bool = True

    @property
    def norm(self) -> float:
        """L2 norm of the first array."""
        return math.sqrt(self.squares)

    @property
    def other_norm(self) -> float:
        """L2 norm of the second array."""
        return math.sqrt(self.other_squares)

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of the first array; inf if only the latter is 0."""
        if self.difference_squares == 0:
            return 0.0
        if self.squares == 0:
            return math.inf
        return math.sqrt(self.difference_squares) / self.norm

    def merge(self, other: "Change") -> "Change":
        """Return the difference of the concatenated arrays."""
        largest = max(self.largest, other.largest)
        if math.isnan(self.largest) or math.isnan(other.largest):
            largest = math.nan
        return Change(
            self.squares + other.squares,
            self.other_squares + other.other_squares,
            self.difference_squares + other.difference_squares,
            largest,
            self.equal and other.equal,
        )


class ArrayChange(NamedTuple):
    """Difference of an array, and of each layer if it stacks layers.

    Attributes
    ----------
    key
        Key of the array in both checkpoints.
    change
        Difference of the whole array.
    stack
        Key of the stack, such as ``params/blocks``; None: not stacked.
    layers
        Differences by index of the first axis; empty if not stacked.
    """

    key: str
    change: Change
    stack: str | None
    layers: tuple[Change, ...]


def merge_changes(changes: Sequence[Change]) -> Change:
    """Return the difference of all arrays concatenated."""
    return functools.reduce(Change.merge, changes, Change())


def compare_leaf(
    checkpoint: Checkpoint, other: Checkpoint, key: str, *, stacked: str
) -> ArrayChange:
    """Compare a leaf with the same shape in both checkpoints.

    Parameters
    ----------
    checkpoint, other
        The checkpoints. Every byte is verified as it is read.
    key
        Key of the leaf.
    stacked
        Key part of leaves that stack layers along their first axis.

    Raises
    ------
    CorruptCheckpointError
        If the content of a file differs from what was saved.
    """
    array, other_array = checkpoint.leaf(key), other.leaf(key)
    stack = stack_of(key, checkpoint.manifest.leaves[key], stacked)
    if stack is None:
        return ArrayChange(key, compare(array, other_array), None, ())
    layers = tuple(compare(array[i], other_array[i]) for i in range(len(array)))
    return ArrayChange(key, merge_changes(layers), stack, layers)


def stack_of(key: str, spec: LeafSpec, stacked: str) -> str | None:
    """Return the key up to the part that names a stack of layers, or None.

    Examples
    --------
    >>> stack_of("params/blocks/mlp/kernel", LeafSpec((12, 4, 4), "float32"), "blocks")
    'params/blocks'
    """
    before, *after = key.split("/")
    parts = [before, *after]
    if stacked not in parts or not spec.shape or not math.prod(spec.shape):
        return None
    return "/".join(parts[: parts.index(stacked) + 1])


def compare(array: np.ndarray, other: np.ndarray) -> Change:
    """Compute the difference of two arrays of the same shape.

    Examples
    --------
    >>> compare(np.array([3, 4]), np.array([3, 2]))
    Change(squares=25.0, other_squares=13.0, difference_squares=4.0, largest=2, equal=False)
    """
    assert array.shape == other.shape
    same_dtype = array.dtype == other.dtype
    a, b = _numbers(array.reshape(-1)), _numbers(other.reshape(-1))
    exact = same_dtype and a.dtype.kind in "iu"
    differ = _integer_differences if exact else _differences
    changes = []
    for start in range(0, a.size, _CHUNK):
        part, other_part = a[start : start + _CHUNK], b[start : start + _CHUNK]
        equal = same_dtype and part.tobytes() == other_part.tobytes()
        changes.append(_change(part, other_part, equal, differ))
    return merge_changes(changes or [Change(equal=same_dtype)])


def _change(
    a: np.ndarray,
    b: np.ndarray,
    equal: bool,
    differ: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Change:
    a_squares, b_squares = _squares(a), _squares(b)
    if equal:
        return Change(a_squares, b_squares)
    differences = differ(a, b)
    largest = differences.max().item()
    return Change(a_squares, b_squares, _squares(differences), largest, equal=False)


def _numbers(flat: np.ndarray) -> np.ndarray:
    """Return a view, or a copy if NumPy cannot compute with the dtype."""
    kind = flat.dtype.kind
    if kind == "b":
        return flat.view(np.uint8)
    if kind == "c":  # interleaved real and imaginary parts
        return flat.view(flat.real.dtype)
    if kind in "iuf" or is_float(flat.dtype.name):
        return flat
    return flat.astype(np.int8)  # int2, int4 and the like of ml_dtypes


def _squares(values: np.ndarray) -> float:
    wide = values.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(wide, wide))


def _differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(same, 0.0, np.abs(a - b))


def _integer_differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return absolute differences modulo 2**64, which neither round nor overflow."""
    larger, smaller = np.maximum(a, b).astype(np.uint64), np.minimum(a, b).astype(np.uint64)
    differences: np.ndarray = larger - smaller
    return differences
