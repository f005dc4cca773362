"""Stateless samplers: which example a row reads, as a function of (seed, row index).

Random numbers are counter-based: pure functions of (key, row index), in any order.
"""

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]

_FEISTEL_ROUNDS = 6
_MAX_SORTED = 1 << 12  # permutations of at most this many numbers are made by sorting
_INDEPENDENT = int.from_bytes(b"starts")
_CHUNK_SIZE = 1 << 16  # offsets computed together: 512 KiB
_CACHED_CHUNKS = 4  # one batch may read several
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(words: Words) -> Words:
    """Hash 64-bit words of any shape with a bijection; each input bit flips half of the output.

    The finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators") with the constants of Stafford's variant 13.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def derive_key(*numbers: int) -> np.uint64:
    """Fold numbers of 0 to 2**64 - 1, such as seed and epoch, into one key; their order matters.

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
    """Return `width` uniform random 64-bit words for each row, uint64 [R, width].

    The words of a row depend only on its index and on the key, from `derive_key`: use one key for
    each purpose.
    """
    columns = np.arange(1, width + 1, dtype=np.uint64) * _GOLDEN
    starts = splitmix64(row_indices.astype(np.uint64) * _GOLDEN + key)
    return splitmix64(starts[:, None] + columns)


def to_unit_interval(words: Words) -> npt.NDArray[np.float64]:
    """Convert uint64 words to float64 numbers in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


class EpochSampler:
    """Sample without replacement: `count` offsets per epoch in a new order each epoch.

    Offset i of an epoch is ``(stride * i + shift) % ring`` with a random shift of 0 to `slack`.
    The order is a keyed permutation that is computed in chunks on access, so that startup time and
    memory do not depend on `count` or on the step.
    """

    def __init__(
        self, count: int, seed: int, *, stride: int = 1, slack: int = 0, ring: int | None = None
    ):
        self.count = count
        self._seed, self._stride, self._slack, self._ring = seed, stride, slack, ring
        self._chunks: OrderedDict[tuple[int, int], Offsets] = OrderedDict()

    def offsets(self, row_indices: Offsets) -> Offsets:
        """Return the offsets that rows read, int64 [R]; the row indices of all epochs ascend."""
        chunks_per_epoch = -(-self.count // _CHUNK_SIZE)
        first, last = int(row_indices[0]), int(row_indices[-1])
        epoch, start = divmod(first, self.count)
        chunk = start // _CHUNK_SIZE
        if last < epoch * self.count + min((chunk + 1) * _CHUNK_SIZE, self.count):
            chunk_start = epoch * self.count + chunk * _CHUNK_SIZE
            return self._chunk(epoch, chunk)[row_indices - chunk_start]
        epochs, in_epoch = np.divmod(row_indices, self.count)  # the rows span several chunks
        chunks, within = np.divmod(in_epoch, _CHUNK_SIZE)
        found = np.empty(len(row_indices), np.int64)
        numbers = epochs * chunks_per_epoch + chunks
        for number in np.unique(numbers):
            chosen = numbers == number
            found[chosen] = self._chunk(*divmod(int(number), chunks_per_epoch))[within[chosen]]
        return found

    def _chunk(self, epoch: int, chunk: int) -> Offsets:
        offsets = self._chunks.get((epoch, chunk))
        if offsets is None:
            start = chunk * _CHUNK_SIZE
            numbers = np.arange(start, min(start + _CHUNK_SIZE, self.count), dtype=np.uint64)
            key = derive_key(self._seed, epoch)
            offsets = permute_indices(numbers, self.count, key).astype(np.int64)
            offsets *= self._stride
            offsets += int(derive_key(self._seed, epoch, 1)) % (self._slack + 1)
            if self._ring is not None:
                offsets %= self._ring
            self._chunks[epoch, chunk] = offsets
            if len(self._chunks) > _CACHED_CHUNKS:
                self._chunks.popitem(last=False)
        return offsets


class IndependentSampler:
    """Sample with replacement: an independent uniform offset of 0 to `count` - 1 for each row."""

    def __init__(self, count: int, seed: int):
        self.count = count
        self._key = derive_key(seed, _INDEPENDENT)

    def offsets(self, row_indices: Offsets) -> Offsets:
        """Return the offsets that rows read, int64 [R]."""
        words = random_words(self._key, row_indices, 1)[:, 0]
        found: Offsets = (words % np.uint64(self.count)).astype(np.int64)
        return found


def permute_indices(numbers: Words, count: int, key: np.uint64) -> Words:
    """Map numbers through a keyed random permutation of 0 to `count` - 1, uint64 [N].

    Large domains use a Feistel network over the bits of the domain with cycle walking (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"). Over few bits a Feistel network favors
    some permutations, so that small domains are sorted by their hashes instead.
    """
    if count <= _MAX_SORTED:
        order = np.argsort(random_words(key, np.arange(count), 1)[:, 0], kind="stable")
        return order.astype(np.uint64)[numbers]
    bits = max((count - 1).bit_length(), 2)
    low_bits = np.uint64(bits // 2)
    high_bits = np.uint64(bits - bits // 2)
    keys = splitmix64(key + np.arange(1, _FEISTEL_ROUNDS + 1, dtype=np.uint64))
    found = numbers.copy()
    outside = np.arange(len(found))
    while len(outside):  # the domain of the network is less than twice `count`
        found[outside] = _feistel(found[outside], low_bits, high_bits, keys)
        outside = outside[found[outside] >= count]
    return found


def _feistel(words: Words, low_bits: np.uint64, high_bits: np.uint64, keys: Words) -> Words:
    """Permute words of low_bits + high_bits bits: each round XORs one half with a hash."""
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << high_bits) - np.uint64(1)
    high, low = words >> low_bits, words & low_mask
    for index, key in enumerate(keys):
        if index % 2:
            low = low ^ (splitmix64(high + key) & low_mask)
        else:
            high = high ^ (splitmix64(low + key) & high_mask)
    return (high << low_bits) | low
