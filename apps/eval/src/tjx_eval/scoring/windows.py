"""Sliding windows over long token sequences: each token is scored exactly once.

As in Hugging Face's guide to perplexity, a window starts every `stride` tokens, and only tokens
that no earlier window has scored count. Each token then has at least window - stride tokens of
context. With stride = window, the windows are disjoint, as in training. Unlike in the guide, the
token after the last one of a window is scored too, so that no token is lost between windows.

Array axes: B windows in a batch, T tokens in a window.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tjx_nn.id_checks import IGNORE_INDEX

_SHORTEST = 64  # smallest batch length; each length is compiled separately


class Window(NamedTuple):
    """A window of a token sequence.

    Attributes
    ----------
    sequence : int
        Index of the sequence.
    start, end : int
        The inputs are tokens [start, end); the label of each is the next token.
    scored : int
        The labels of inputs [scored, end) count.
    """

    sequence: int
    start: int
    scored: int
    end: int


def sliding_windows(n_labels: int, length: int, stride: int, sequence: int = 0) -> Iterator[Window]:
    """Yield the windows of a sequence of n_labels + 1 tokens.

    Examples
    --------
    >>> [(each.start, each.scored, each.end) for each in sliding_windows(10, length=4, stride=2)]
    [(0, 0, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    >>> [(each.start, each.scored, each.end) for each in sliding_windows(10, length=4, stride=4)]
    [(0, 0, 4), (4, 4, 8), (8, 8, 10)]
    """
    done = start = 0
    while done < n_labels:
        end = min(start + length, n_labels)
        yield Window(sequence, start, done, end)
        done, start = end, start + stride


def plan_batches(
    windows: Sequence[Window], length: int, batch_size: int
) -> list[tuple[int, list[Window]]]:
    """Group windows of similar length into batches, so that few shapes are compiled.

    Returns
    -------
    list of (int, list of Window)
        Padded length and at most `batch_size` windows of each batch, longest first.
    """
    lengths = [length]
    while lengths[-1] > _SHORTEST:
        lengths.append(-(-lengths[-1] // 2))
    pools: dict[int, list[Window]] = {each: [] for each in lengths}
    for window in windows:
        pools[min(n for n in lengths if n >= window.end - window.start)].append(window)
    # A length that does not fill one batch is not worth a compilation: pad to the next length.
    for longer, shorter in zip(lengths[-2::-1], lengths[:0:-1], strict=True):
        if len(pools[shorter]) < batch_size:
            pools[longer] += pools.pop(shorter)
    return [
        (each, pool[first : first + batch_size])
        for each, pool in pools.items()
        for first in range(0, len(pool), batch_size)
    ]


def make_batch(
    sequences: Sequence[NDArray[np.int32]],
    windows: Sequence[Window],
    batch_size: int,
    length: int,
) -> dict[str, NDArray[np.int32]]:
    """Return ``tokens`` and ``labels`` [B, T] of windows; padding has the label -100."""
    tokens = np.zeros((batch_size, length), np.int32)
    labels = np.full_like(tokens, IGNORE_INDEX)
    for row, window in enumerate(windows):
        sequence = sequences[window.sequence]
        tokens[row, : window.end - window.start] = sequence[window.start : window.end]
        scored = slice(window.scored - window.start, window.end - window.start)
        labels[row, scored] = sequence[window.scored + 1 : window.end + 1]
    return {"tokens": tokens, "labels": labels}
