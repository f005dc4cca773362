"""Deterministic schedules that interleave corpora in the proportions of their weights."""

import heapq
import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction

import numpy as np
import numpy.typing as npt

MAX_PERIOD = 100_000
"""Rows after which a schedule repeats at the latest."""


def rows_per_period(weights: Mapping[str, int | float]) -> list[int]:
    """Convert weights to whole numbers of rows per period.

    The numbers are exact if their sum is at most `MAX_PERIOD`. Otherwise they are rounded to that
    sum by the largest-remainder method.

    Parameters
    ----------
    weights : mapping
        Weight above 0 of each corpus; their decimal representation is taken as exact.

    Returns
    -------
    list of int
        Rows of each corpus, in the order of `weights`.

    Raises
    ------
    ValueError
        If rounding leaves a corpus without a row.

    Examples
    --------
    >>> rows_per_period({"books": 0.3, "code": 0.6, "web": 0.1})
    [3, 6, 1]
    """
    exact = [Fraction(Decimal(str(float(weight)))) for weight in weights.values()]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    counts = [math.floor(share * MAX_PERIOD) for share in shares]
    remainders = [share * MAX_PERIOD - count for share, count in zip(shares, counts, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda i: -remainders[i])
    for i in by_remainder[: MAX_PERIOD - sum(counts)]:
        counts[i] += 1
    if absent := [name for name, count in zip(weights, counts, strict=True) if count == 0]:
        raise ValueError(
            f"weights: got less than one row of {MAX_PERIOD:,} for {', '.join(absent)}; give a "
            "larger weight, or leave the corpus out"
        )
    return counts


def mixture_schedule(counts: list[int]) -> npt.NDArray[np.int64]:
    """Interleave corpora so that no corpus's row count deviates from its share by a full row.

    Tijdeman 1980, "The chairman assignment problem" (Discrete Mathematics 32): for k corpora a
    schedule exists that never deviates by more than 1 - 1 / (2k - 2) rows. This bound gives an
    earliest and a latest position for each row of each corpus. Filling each position with the
    available row of the earliest deadline finds a schedule whenever one exists.

    Parameters
    ----------
    counts : list of int
        Rows per period of each corpus, above 0.

    Returns
    -------
    int64 [sum of counts]
        Index of the corpus of each row of the period.

    Examples
    --------
    >>> mixture_schedule([3, 1]).tolist()
    [0, 0, 1, 0]
    """
    period, parts = sum(counts), max(2 * len(counts) - 2, 2)
    released: list[list[tuple[int, int]]] = [[] for _ in range(period)]
    for corpus, count in enumerate(counts):
        for k in range(count):  # row k of the corpus is between these positions, both included
            earliest = -(-(parts * k + 1) * period // (parts * count)) - 1
            latest = (parts * (k + 1) - 1) * period // (parts * count)
            released[earliest].append((latest, corpus))
    schedule = np.empty(period, np.int64)
    available: list[tuple[int, int]] = []
    for position, rows in enumerate(released):
        for row in rows:
            heapq.heappush(available, row)
        latest, schedule[position] = heapq.heappop(available)
        assert latest >= position
    return schedule
