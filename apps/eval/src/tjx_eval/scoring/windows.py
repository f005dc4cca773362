"""Windows of a long text: each token is scored once, with at least window - stride before it.

The definition is that of Hugging Face's guide to perplexity: a window begins every `stride` tokens,
and of each only what no window before it has scored counts. With stride = window the windows are
disjoint, as in training. Here the token after a window's last is scored too, so that none is lost
between two windows.

Names of array axes: B rows of a batch, T tokens in a row.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IGNORED_LABEL = -100
_SHORTEST = 64  # rows of fewer tokens are not told apart: each length is compiled


class Row(NamedTuple):
    """A window of a stretch of tokens.

    Attributes
    ----------
    stretch : int
        Which stretch.
    start, end : int
        The inputs are its tokens [start, end), the labels those after each.
    scored : int
        Labels of inputs [scored, end) count.
    """

    stretch: int
    start: int
    scored: int
    end: int


def cut_windows(n_labels: int, window: int, stride: int, stretch: int = 0) -> Iterator[Row]:
    """Yield the windows of a stretch of n_labels + 1 tokens.

    Examples
    --------
    >>> [(row.start, row.scored, row.end) for row in cut_windows(10, window=4, stride=2)]
    [(0, 0, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    >>> [(row.start, row.scored, row.end) for row in cut_windows(10, window=4, stride=4)]
    [(0, 0, 4), (4, 4, 8), (8, 8, 10)]
    """
    done = start = 0
    while done < n_labels:
        end = min(start + window, n_labels)
        yield Row(stretch, start, done, end)
        done, start = end, start + stride


def plan_batches(rows: Sequence[Row], window: int, batch_size: int) -> list[tuple[int, list[Row]]]:
    """Put rows of like lengths into batches of one length, so that few shapes are compiled.

    Returns
    -------
    list of (int, list of Row)
        Tokens in a row, and at most `batch_size` rows; the longest first.
    """
    lengths = [window]
    while lengths[-1] > _SHORTEST:
        lengths.append(-(-lengths[-1] // 2))
    pools: dict[int, list[Row]] = {length: [] for length in lengths}
    for row in rows:
        pools[min(length for length in lengths if length >= row.end - row.start)].append(row)
    # A length that fills no batch is not worth compiling: its rows join longer ones.
    for longer, length in zip(lengths[-2::-1], lengths[:0:-1], strict=True):
        if len(pools[length]) < batch_size:
            pools[longer] += pools.pop(length)
    return [
        (length, pool[first : first + batch_size])
        for length, pool in pools.items()
        for first in range(0, len(pool), batch_size)
    ]


def fill_batch(
    stretches: Sequence[NDArray[np.int32]], rows: Sequence[Row], batch_size: int, length: int
) -> dict[str, NDArray[np.int32]]:
    """Return ``tokens`` and ``labels`` [B, T] of rows; what lies behind them has no label."""
    tokens = np.zeros((batch_size, length), np.int32)
    labels = np.full_like(tokens, IGNORED_LABEL)
    for index, row in enumerate(rows):
        stretch = stretches[row.stretch]
        tokens[index, : row.end - row.start] = stretch[row.start : row.end]
        here = slice(row.scored - row.start, row.end - row.start)
        labels[index, here] = stretch[row.scored + 1 : row.end + 1]
    return {"tokens": tokens, "labels": labels}
