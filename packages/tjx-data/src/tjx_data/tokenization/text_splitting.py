"""Splitting of long texts at token boundaries, and batching for the encoder.

GPT-2's pre-tokenization never joins white space to the preceding character and has no lookbehind,
so that there is always a token boundary between a letter and a following space. Splitting only
there changes neither token ids nor the pair counts of BPE training. It allows parallel encoding of
one long document in bounded memory.
"""

import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from tjx_data.prepared.executors import available_cpus

SEGMENT_CHARACTERS = 1 << 11
"""Smallest segment by default; `tokenizers` encodes longer texts more slowly."""
BATCH_CHARACTERS = 1 << 18
"""Characters encoded at once; bounds the memory."""
_SEGMENT_OVERHEAD = 64  # memory of a segment besides its text, in characters

LONE_SURROGATE = (
    "text: got a lone surrogate, which has no UTF-8; read files with encoding='utf-8', or encode "
    "with errors='replace' first"
)

# Stricter than necessary, so that it does not depend on the two engines' definitions of \s, \p{L}.
_BOUNDARY = re.compile(r"(?<=[A-Za-z0-9.,;:!?])(?=[ \n])")


class TextSegment(NamedTuple):
    """Consecutive characters of a text, and whether they end it."""

    text: str
    is_last: bool


def split_at_token_boundaries(text: str, size: int = SEGMENT_CHARACTERS) -> Iterator[str]:
    """Split a text into segments of at least `size` characters that no token crosses.

    Parameters
    ----------
    text : str
        The text.
    size : int
        Minimum length of all segments but the last.

    Examples
    --------
    >>> list(split_at_token_boundaries("one two three", size=4))
    ['one two', ' three']
    """
    assert size > 0
    start = 0
    while len(text) - start > size:
        boundary = _BOUNDARY.search(text, start + size)
        if boundary is None:
            break
        yield text[start : boundary.start()]
        start = boundary.start()
    if start < len(text) or not text:
        yield text[start:]


def segment_batches(texts: Iterable[str], segment_size: int | None) -> Iterator[list[TextSegment]]:
    """Group texts into batches of about `BATCH_CHARACTERS`, reading lazily.

    Parameters
    ----------
    texts : Iterable[str]
        Read once.
    segment_size : int or None
        Minimum length of the segments of a long text; None if texts cannot be split.
    """
    batch: list[TextSegment] = []
    cost = 0
    for text in texts:
        n_left = len(text)
        for segment in split_at_token_boundaries(text, segment_size) if segment_size else (text,):
            n_left -= len(segment)
            batch.append(TextSegment(segment, n_left == 0))
            cost += len(segment) + _SEGMENT_OVERHEAD
            if cost >= BATCH_CHARACTERS:
                yield batch
                batch, cost = [], 0
    if batch:
        yield batch


def encode_batches(
    encode: Callable[[list[TextSegment], int], list[list[int]]],
    batches: Iterator[list[TextSegment]],
) -> Iterator[tuple[list[TextSegment], list[list[int]]]]:
    """Encode batches of segments, each core the next one, while their results are used.

    TOKENIZERS_PARALLELISM=false limits it to one core, as it does in `tokenizers`.

    Parameters
    ----------
    encode : callable
        From the segments of a batch, and a number of threads, to their ids.
    batches : Iterator of list of TextSegment
        Read one ahead for each core.

    Yields
    ------
    segments, ids
        Each batch in order, with its result.
    """
    first = list(itertools.islice(batches, 2))
    one_core = os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "0", "off")
    n_threads = 1 if one_core else available_cpus()
    if n_threads == 1 or len(first) < 2:
        for batch in itertools.chain(first, batches):
            yield batch, encode(batch, n_threads)
        return
    waiting: deque[tuple[list[TextSegment], Future[list[list[int]]]]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for batch in itertools.chain(first, batches):
            waiting.append((batch, pool.submit(encode, batch, 1)))
            if len(waiting) > n_threads:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def splits_before_space(description: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer never joins white space to a preceding letter or full stop.

    Parameters
    ----------
    description : Mapping
        Content of its ``tokenizer.json``.

    Returns
    -------
    bool
        True for GPT-2's pre-tokenization, characters and bytes: `split_at_token_boundaries` then
        keeps all ids.
    """
    plain_added = any(not token["special"] for token in description["added_tokens"])
    if description["normalizer"] is not None or plain_added:
        return False
    model, pre_tokenizer = description["model"], description["pre_tokenizer"]
    joins = model["type"] != "BPE" or bool(model["merges"]) or model["ignore_merges"]
    if pre_tokenizer is None:
        return not joins
    if pre_tokenizer["type"] != "ByteLevel" or pre_tokenizer["add_prefix_space"]:
        return False
    return bool(pre_tokenizer["use_regex"]) or not joins
