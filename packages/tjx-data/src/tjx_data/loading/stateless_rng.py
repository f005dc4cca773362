"""Random numbers that are a function of (seed, turn): no generator, no state, any order."""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(words: Words) -> Words:
    """Return a bijection of 64-bit words that changes half of the bits for any changed bit.

    The finaliser of SplitMix64: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators", with Stafford's variant 13 of its constants.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def derive_key(*numbers: int) -> np.uint64:
    """Return one word that depends on all numbers and their order; each is 0 to 2**64 - 1.

    Examples
    --------
    >>> key_of(1, 2) == key_of(2, 1)
    np.False_
    """
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = splitmix64((key + _GOLDEN) ^ splitmix64(np.array([number], np.uint64) + _GOLDEN))
    found: np.uint64 = key[0]
    return found


def draw(key: np.uint64, turns: npt.NDArray[np.int64], width: int) -> Words:
    """Draw `width` words for each turn.

    Parameters
    ----------
    key : uint64
        From `key_of`: the seed, and what the numbers are for.
    turns : int64 [R]
        The same numbers come for the same turn, whatever is asked for beside it.
    width : int
        Words a turn.

    Returns
    -------
    uint64 [R, width]
        Each word of 0 to 2**64 - 1 equally likely.
    """
    columns = np.arange(1, width + 1, dtype=np.uint64) * _GOLDEN
    starts = splitmix64(turns.astype(np.uint64) * _GOLDEN + key)
    return splitmix64(starts[:, None] + columns)


def fractions(words: Words) -> npt.NDArray[np.float64]:
    """Turn words into numbers of [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
