"""Texts in pieces whose tokens, joined, are exactly the tokens of the whole, and in batches.

GPT-2's pre-tokenisation never joins white space to what stands before it, and never looks back:
between a letter and the space after it there is always a border between two tokens. Cutting only
there changes neither token ids nor the counts that BPE merges are learnt from, and lets one long
document be worked on in parallel and in bounded memory.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECE_CHARACTERS = 1 << 11  # longer texts are encoded more slowly
BATCH_CHARACTERS = 1 << 18  # encoded at once; bounds the memory
_PIECE_COST = 64  # what a piece costs beside its text, in characters: many may be empty

LONE_SURROGATE = (
    "a text holds a lone surrogate, which no UTF-8 file can hold: read files with "
    "encoding='utf-8', or encode with errors='replace' first"
)

# Fewer places than the rule allows, so that the two engines need not agree on what \s or \p{L} is.
_BORDER = re.compile(r"(?<=[A-Za-z0-9.,;:!?])(?=[ \n])")


class TextSegment(NamedTuple):
    """A stretch of a text, and whether the text ends with it."""

    text: str
    is_last: bool


def split_at_token_boundaries(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text into pieces of at least `size` characters at places where no token crosses.

    Examples
    --------
    >>> list(split_exactly("one two three", size=4))
    ['one two', ' three']
    """
    assert size > 0
    start = 0
    while len(text) - start > size:
        border = _BORDER.search(text, start + size)
        if border is None:
            break
        yield text[start : border.start()]
        start = border.start()
    if start < len(text) or not text:
        yield text[start:]


def batches(texts: Iterable[str], *, may_cut: bool) -> Iterator[list[TextSegment]]:
    """Yield texts in batches of about `BATCH_CHARACTERS`, reading no further than the batch.

    Parameters
    ----------
    texts : Iterable[str]
        Read once.
    may_cut : bool
        Whether long texts are cut; else a piece is a text.
    """
    batch: list[TextSegment] = []
    cost = 0
    for text in texts:
        n_left = len(text)
        for piece in split_at_token_boundaries(text) if may_cut else (text,):
            n_left -= len(piece)
            batch.append(TextSegment(piece, n_left == 0))
            cost += len(piece) + _PIECE_COST
            if cost >= BATCH_CHARACTERS:
                yield batch
                batch, cost = [], 0
    if batch:
        yield batch
