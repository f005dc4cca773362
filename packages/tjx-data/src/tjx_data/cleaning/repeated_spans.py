"""Exact removal of spans of text that occurred before (Lee et al. 2022, arXiv:2107.06499).

A byte is repeated if it lies in a window of `n` bytes of its document that equals an earlier one.
Windows are compared by rolling hashes of 128 bits, in two passes over the parts:

1. Every document is cut into blocks of `n // 2` bytes, and the hashes of the blocks are sorted. Two
   equal windows of `n` bytes each contain a whole block that occurs in the other.
2. The hash of the `n // 2` bytes at every position is searched among those of the blocks. Only
   windows around the positions found there, a few more than the repeated ones, are hashed whole and
   grouped.

Memory is about 70 / n bytes for each byte of text (n = 200: 35 %), 50 bytes for each repeated byte,
and 50 for each byte of the largest part.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MIN_BYTES = 32
"""Shortest span that can be removed: shorter ones are phrases of the language."""
_CHUNK = 1 << 20
_BASES = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)  # odd: powers never become 0 modulo 2**64

Bytes = npt.NDArray[np.uint8]
Hashes = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]


class Texts(NamedTuple):
    """Documents of a part.

    Attributes
    ----------
    content : array
        Their UTF-8, uint8 [bytes].
    lengths : array
        Bytes of each, int64 [documents].
    is_kept : array
        Whether a document takes part, bool [documents].
    """

    content: Bytes
    lengths: Positions
    is_kept: npt.NDArray[np.bool_]


def find_repeated_spans(parts: Callable[[], Iterable[Texts]], n: int) -> Positions:
    """Find the spans of text that repeat earlier text of at least `n` bytes.

    Of equal spans the first stays. Spans do not cross documents. Two occurrences do not overlap, so
    that of a run of one character the first `n` bytes stay.

    Parameters
    ----------
    parts : Callable
        Starts a pass over the documents, the same ones in the same order on every call.
    n : int
        Smallest length of a span [bytes].

    Returns
    -------
    array
        Start and end of each span in the contents of all parts one after another, ascending,
        int64 [spans, 2].

    Examples
    --------
    >>> text = np.frombuffer(b"to be or not to be", np.uint8)
    >>> one = Texts(text, np.array([len(text)]), np.array([True]))
    >>> find_repeated_spans(lambda: [one], 4).tolist()
    [[13, 18]]
    """
    width = n // 2
    index = _Index(np.concatenate([_NONE, *(_block_hashes(part, width) for part in parts())]))
    if not len(index):
        return np.zeros((0, 2), np.int64)
    found: list[tuple[Positions, Hashes, Hashes]] = []
    offset = 0
    for part in parts():
        starts = _candidates(part, n, width, index)
        first_hash, second_hash = (_hashes_at(part.content, starts, n, which) for which in (0, 1))
        found.append((starts + offset, first_hash, second_hash))
        offset += len(part.content)
    places, first_hash, second_hash = (np.concatenate(some) for some in zip(*found, strict=True))
    order = np.argsort(first_hash, kind="stable")
    places, first_hash, second_hash = places[order], first_hash[order], second_hash[order]
    begins = np.ones(len(places), bool)  # of a group of equal hashes
    begins[1:] = first_hash[1:] != first_hash[:-1]
    first = np.flatnonzero(begins)[np.cumsum(begins) - 1]
    is_later = (places - places[first] >= n) & (second_hash == second_hash[first])
    return _merge(np.sort(places[is_later]), n)


def cut_spans(content: bytes, spans: Positions) -> bytes:
    """Remove spans from UTF-8, without those bytes of them that belong to a partial character.

    Parameters
    ----------
    content : bytes
        UTF-8 text.
    spans : array
        Start and end of each span, ascending, int64 [spans, 2].

    Examples
    --------
    >>> cut_spans("a\u00e9b".encode(), np.array([[2, 4]])).decode()
    'a\u00e9'
    """
    kept, position = [], 0
    for start, end in spans.tolist():
        while start < end and _continues(content, start):
            start += 1
        while end > start and _continues(content, end):
            end -= 1
        kept.append(content[position:start])
        position = end
    return b"".join([*kept, content[position:]])


def _continues(content: bytes, position: int) -> bool:
    """Return whether a byte belongs to the character that begins before it."""
    return position < len(content) and content[position] & 0xC0 == 0x80


class _Index:
    """Set of hashes of blocks.

    Parameters
    ----------
    hashes : array
        Of all blocks, uint64 [blocks]; sorted in place.
    """

    def __init__(self, hashes: Hashes) -> None:
        hashes.sort()
        first = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)])
        self._known = hashes[first]
        self._is_repeated = np.diff(first, append=len(hashes)) > 1
        bits = max(len(hashes) - 1, 1).bit_length() + 2
        self._shift = np.uint64(64 - bits)
        self._may_hold = np.zeros(1 << bits, bool)  # most hashes are not searched
        self._may_hold[self._known >> self._shift] = True

    def __len__(self) -> int:
        return len(self._known)

    def find(
        self, hashes: Hashes, is_block: npt.NDArray[np.bool_], allowed: npt.NDArray[np.bool_]
    ) -> Positions:
        """Return the places whose hash is that of a block elsewhere."""
        places = np.flatnonzero(self._may_hold[hashes >> self._shift] & allowed)
        wanted = hashes[places]
        positions = np.minimum(np.searchsorted(self._known, wanted), len(self._known) - 1)
        found = self._known[positions] == wanted
        found &= ~is_block[places] | self._is_repeated[positions]
        elsewhere: Positions = places[found]
        return elsewhere


def _block_hashes(part: Texts, width: int) -> Hashes:
    """Return the hashes of the blocks of a part."""
    is_block = _block_starts(part, width)
    return np.concatenate(
        [
            _NONE,
            *(
                hashes[is_block[start : start + len(hashes)]]
                for start, hashes in _rolling_hashes(part.content, width, 0)
            ),
        ]
    )


def _block_starts(part: Texts, width: int) -> npt.NDArray[np.bool_]:
    """Mark the starts of the blocks of the kept documents, bool [bytes]."""
    marks = np.zeros(len(part.content), bool)
    ends = np.cumsum(part.lengths)
    for end, length in zip(ends[part.is_kept], part.lengths[part.is_kept], strict=True):
        start = end - length
        marks[start : end - width + 1 : width] = length >= width
    return marks


def _fits(part: Texts, width: int) -> npt.NDArray[np.bool_]:
    """Mark the positions where a window lies in one kept document, bool [bytes]."""
    last = np.repeat(np.cumsum(part.lengths) - width, part.lengths)
    fits: npt.NDArray[np.bool_] = np.arange(len(part.content)) <= last
    return fits & np.repeat(part.is_kept, part.lengths)


def _candidates(part: Texts, n: int, width: int, index: _Index) -> Positions:
    """Return the starts of the windows that contain a block which occurs elsewhere."""
    is_block, fits = _block_starts(part, width), _fits(part, width)
    change = np.zeros(len(part.content) + 1, np.int32)
    for start, hashes in _rolling_hashes(part.content, width, 0):
        here = slice(start, start + len(hashes))
        hits = start + index.find(hashes, is_block[here], fits[here])
        np.add.at(change, np.maximum(hits - (n - width), 0), 1)
        np.add.at(change, hits + 1, -1)
    return np.flatnonzero((np.cumsum(change[:-1]) > 0) & _fits(part, n))


def _hashes_at(content: Bytes, starts: Positions, width: int, which: int) -> Hashes:
    """Return the hashes of the windows at some positions."""
    found = [_NONE]
    if len(starts):
        for first, hashes in _rolling_hashes(content, width, which):
            low, high = np.searchsorted(starts, (first, first + len(hashes)))
            found.append(hashes[starts[low:high] - first])
    return np.concatenate(found)


def _rolling_hashes(content: Bytes, width: int, which: int) -> Iterator[tuple[int, Hashes]]:
    """Yield the first position and the hashes of consecutive windows of `width` bytes.

    The hash of c[0] ... c[width - 1] is that of the polynomial of table[c[j]] with base**j, modulo
    2**64, mixed so that its high bits depend on all bytes.
    """
    table, powers = _constants(which, _CHUNK + width)
    for start in range(0, len(content) - width + 1, _CHUNK):
        chunk = content[start : start + _CHUNK + width - 1]
        sums = np.zeros(len(chunk) + 1, np.uint64)
        np.cumsum(table[chunk] * powers[: len(chunk)], out=sums[1:])
        count = len(chunk) - width + 1
        # The factor makes the power of the first byte the same for all windows.
        hashes = (sums[width:] - sums[:-width]) * powers[_CHUNK - count + 1 : _CHUNK + 1][::-1]
        hashes = (hashes ^ (hashes >> np.uint64(32))) * np.uint64(_BASES[1 - which])
        yield start, hashes ^ (hashes >> np.uint64(29))


@cache
def _constants(which: int, count: int) -> tuple[Hashes, Hashes]:
    """Return random values of the 256 bytes, and powers of the base."""
    rng = np.random.default_rng(which)
    table = rng.integers(0, 1 << 64, 256, np.uint64)
    powers = np.full(count, _BASES[which], np.uint64)
    powers[0] = 1
    np.cumprod(powers, out=powers)
    return table, powers


def _merge(starts: Positions, n: int) -> Positions:
    """Join the windows at some starts that overlap; int64 [spans, 2]."""
    if not len(starts):
        return np.zeros((0, 2), np.int64)
    begins = np.flatnonzero(np.diff(starts, prepend=starts[0] - n) >= n)
    ends = starts[np.append(begins[1:], len(starts)) - 1] + n
    return np.stack([starts[begins], ends], axis=1)


_NONE: Hashes = np.zeros(0, np.uint64)
