"""Long texts in pieces whose tokens, joined, are exactly the tokens of the whole.

GPT-2's pre-tokenisation never joins white space to what stands before it, and never looks back:
between a letter and the space after it there is always a border between two tokens. Cutting only
there changes neither token ids nor the counts that BPE merges are learnt from, and lets one long
document be worked on in parallel and in bounded memory.
"""

import re
from collections.abc import Iterator

PIECE_CHARACTERS = 1 << 15

# Fewer places than the rule allows, so that the two engines need not agree on what \s or \p{L} is.
_BORDER = re.compile(r"(?<=[A-Za-z0-9.,;:!?])(?=[ \n])")


def split_exactly(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
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
