"""The order in which examples come: a function of (seed, epoch), without any state."""

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from tjx_data.loading.stateless_rng import Words, derive_key, draw, splitmix64

Places = npt.NDArray[np.int64]

_ROUNDS = 6
_FEW = 1 << 12  # numbers that are sorted
_INDEPENDENT = int.from_bytes(b"starts")
_AT_ONCE = 1 << 16  # places of an epoch that are worked out together: 512 KiB


class EpochSampler:
    """Visits `count` places once an epoch, each time in another order, epoch after epoch.

    The order is a permutation with a key, worked out a stretch at a time where it is needed, so
    that neither the first step nor the millionth waits for a list of all places to be shuffled,
    nor holds one.

    Parameters
    ----------
    count : int
        Places of an epoch.
    seed : int
        Decides the orders, with the epoch; 0 to 2**64 - 1.
    stride : int
        Distance between neighbouring places.
    slack : int
        Places of an epoch start at one of 0 to `slack`, drawn for each epoch.
    ring : int, optional
        Places wrap around at this many.
    """

    def __init__(
        self, count: int, seed: int, *, stride: int = 1, slack: int = 0, ring: int | None = None
    ):
        self.count = count
        self._seed, self._stride, self._slack, self._ring = seed, stride, slack, ring
        self._stretches: OrderedDict[tuple[int, int], Places] = OrderedDict()

    def places(self, turns: Places) -> Places:
        """Return the places that are visited in some turns, which ascend, over all epochs."""
        stretches_per_epoch = -(-self.count // _AT_ONCE)
        first, last = int(turns[0]), int(turns[-1])
        epoch, start = divmod(first, self.count)
        stretch = start // _AT_ONCE
        if last < epoch * self.count + min((stretch + 1) * _AT_ONCE, self.count):
            return self._stretch(epoch, stretch)[turns - (epoch * self.count + stretch * _AT_ONCE)]
        epochs, in_epoch = np.divmod(turns, self.count)  # these turns lie in several stretches
        stretches, within = np.divmod(in_epoch, _AT_ONCE)
        found = np.empty(len(turns), np.int64)
        numbers = epochs * stretches_per_epoch + stretches
        for number in np.unique(numbers):
            chosen = numbers == number
            of_epoch, of_stretch = divmod(int(number), stretches_per_epoch)
            found[chosen] = self._stretch(of_epoch, of_stretch)[within[chosen]]
        return found

    def _stretch(self, epoch: int, stretch: int) -> Places:
        if (epoch, stretch) not in self._stretches:
            start = stretch * _AT_ONCE
            turns = np.arange(start, min(start + _AT_ONCE, self.count), dtype=np.uint64)
            places = permute_indices(turns, self.count, derive_key(self._seed, epoch)).astype(
                np.int64
            )
            places *= self._stride
            places += int(derive_key(self._seed, epoch, 1)) % (self._slack + 1)
            if self._ring is not None:
                places %= self._ring
            self._stretches[epoch, stretch] = places
            if len(self._stretches) > 4:  # a batch may need several at once
                self._stretches.popitem(last=False)
        return self._stretches[epoch, stretch]


class IndependentSampler:
    """Visits a place drawn independently for each turn, uniform over 0 to `count` - 1.

    Parameters
    ----------
    count : int
        Number of places.
    seed : int
        Decides the draws, with the turn; 0 to 2**64 - 1.
    """

    def __init__(self, count: int, seed: int):
        self.count = count
        self._key = derive_key(seed, _INDEPENDENT)

    def places(self, turns: Places) -> Places:
        """Return the places that are visited in some turns."""
        found: Places = (draw(self._key, turns, 1)[:, 0] % np.uint64(self.count)).astype(np.int64)
        return found


def permute_indices(numbers: Words, count: int, key: np.uint64) -> Words:
    """Return where a permutation of 0 to `count` - 1 takes some numbers.

    A Feistel network over the bits that numbers below `count` have, walked until it gives such a
    number again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Over few bits
    it would favour some permutations; few numbers are sorted by their hashes instead.
    """
    if count <= _FEW:
        order = np.argsort(draw(key, np.arange(count), 1)[:, 0], kind="stable")
        return order.astype(np.uint64)[numbers]
    bits = max((count - 1).bit_length(), 2)
    low_bits = np.uint64(bits // 2)
    high_bits = np.uint64(bits - bits // 2)
    keys = splitmix64(key + np.arange(1, _ROUNDS + 1, dtype=np.uint64))
    found = numbers.copy()
    outside = np.arange(len(found))
    while len(outside):  # at most two walks for half of the numbers
        found[outside] = _feistel(found[outside], low_bits, high_bits, keys)
        outside = outside[found[outside] >= count]
    return found


def _feistel(words: Words, low_bits: np.uint64, high_bits: np.uint64, keys: Words) -> Words:
    """Permute words of low_bits + high_bits bits: each half is changed by a hash of the other."""
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << high_bits) - np.uint64(1)
    high, low = words >> low_bits, words & low_mask
    for index, key in enumerate(keys):
        if index % 2:
            low = low ^ (splitmix64(high + key) & low_mask)
        else:
            high = high ^ (splitmix64(low + key) & high_mask)
    return (high << low_bits) | low
