"""Counter-based random numbers: pure functions of (key, row index), in any order."""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(words: Words) -> Words:
    """Hash 64-bit words with a bijection in which each input bit flips half of the output bits.

    The finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators") with the constants of Stafford's variant 13.

    Parameters
    ----------
    words : uint64 array
        Any shape.

    Returns
    -------
    uint64 array
        Same shape.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def derive_key(*numbers: int) -> np.uint64:
    """Fold numbers into one key; the order of the numbers matters.

    Parameters
    ----------
    *numbers : int
        Each 0 to 2**64 - 1, such as the seed and the epoch.

    Examples
    --------
    >>> derive_key(1, 2) == derive_key(2, 1)
    np.False_
    """
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = splitmix64((key + _GOLDEN) ^ splitmix64(np.array([number], np.uint64) + _GOLDEN))
    found: np.uint64 = key[0]
    return found


def random_words(key: np.uint64, row_indices: npt.NDArray[np.int64], width: int) -> Words:
    """Return `width` random 64-bit words for each row.

    Parameters
    ----------
    key : uint64
        From `derive_key`, one key for each purpose.
    row_indices : int64 [R]
        The words of a row depend on the key and its own index only.
    width : int
        Words per row.

    Returns
    -------
    uint64 [R, width]
        Uniform over 0 to 2**64 - 1.
    """
    columns = np.arange(1, width + 1, dtype=np.uint64) * _GOLDEN
    starts = splitmix64(row_indices.astype(np.uint64) * _GOLDEN + key)
    return splitmix64(starts[:, None] + columns)


def to_unit_interval(words: Words) -> npt.NDArray[np.float64]:
    """Convert uint64 words to float64 numbers in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
