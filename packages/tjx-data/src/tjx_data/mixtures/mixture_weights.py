"""Weights of mixtures: exact schedules, temperature, and a limit of epochs for each corpus."""

import heapq
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction

import numpy as np
import numpy.typing as npt

MAX_PERIOD = 100_000
"""Rows after which a schedule repeats at the latest."""

Weights = Mapping[str, int | float]


def temperature_weights(sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Weigh corpora by their size to the power of 1 / temperature.

    A temperature of 1 is proportional to the sizes; the higher it is, the more small corpora are
    repeated. Conneau and Lample 2019 ("XLM", arXiv:1901.07291) use 1 / 0.7 for languages, Xue et
    al. 2021 ("mT5", arXiv:2010.11934) 1 / 0.3.

    Parameters
    ----------
    sizes : mapping
        Size of each corpus, for example in tokens.
    temperature : float
        Above 0.

    Returns
    -------
    dict
        Weights whose sum is 1.

    Raises
    ------
    ValueError
        If the temperature or a size is not above 0.

    Examples
    --------
    >>> weights = temperature_weights({"en": 8000, "is": 1000}, temperature=3)
    >>> {name: round(weight, 3) for name, weight in weights.items()}
    {'en': 0.667, 'is': 0.333}
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}; expected a number above 0, such as 3")
    if empty := [name for name, size in sizes.items() if size < 1]:
        raise ValueError(f"sizes: got none for {', '.join(empty)}; expected at least 1")
    largest = max(sizes.values())
    powers = {name: (size / largest) ** (1 / temperature) for name, size in sizes.items()}
    total = math.fsum(powers.values())
    return {name: power / total for name, power in powers.items()}


def limit_epochs(
    by_step: Mapping[int, Weights],
    rows_per_epoch: Mapping[str, int],
    *,
    n_steps: int,
    batch_size: int,
    max_epochs: float,
) -> dict[int, dict[str, int | float]]:
    """Lower the weights of corpora that a run would repeat more than `max_epochs` times.

    The other corpora get the rows that such a corpus lacks, in proportion to their weights. The
    limit is that of the whole run: what the first weights use is missing in the later ones. Up to
    4 epochs of a text are nearly as good as new text; with more, the gain falls to zero
    (Muennighoff et al. 2023, "Scaling data-constrained language models", arXiv:2305.16264). With
    equal weights this is UniMax (Chung et al. 2023, arXiv:2304.09151).

    Parameters
    ----------
    by_step : mapping
        Weights by the step from which they hold; step 0 is one of them.
    rows_per_epoch : mapping
        Rows of each corpus.
    n_steps, batch_size : int
        Steps of the run, and rows of a step.
    max_epochs : float
        Most epochs of each corpus, above 0; kept up to 1 / 100,000 of the rows of the run.

    Returns
    -------
    dict
        Weights in rows; corpora that are used up are left out.

    Raises
    ------
    ValueError
        If the corpora are too small for the run.

    Examples
    --------
    >>> rows = {"web": 1000, "wiki": 50}
    >>> limit_epochs({0: {"web": 1, "wiki": 1}}, rows, n_steps=50, batch_size=10, max_epochs=4)
    {0: {'web': 300, 'wiki': 200}}
    """
    room = {name: math.floor(max_epochs * rows) for name, rows in rows_per_epoch.items()}
    found: dict[int, dict[str, int | float]] = {}
    starts = sorted(by_step)
    for step, end in zip(starts, [*starts[1:], n_steps], strict=True):
        n_rows = (min(end, n_steps) - step) * batch_size
        if n_rows <= 0:  # the run ends before
            found[step] = dict(by_step[step])
            continue
        parts = min(n_rows, MAX_PERIOD)
        most = {name: room[name] * parts // n_rows for name in by_step[step]}
        counts = _fill(by_step[step], most, parts)
        if counts is None:
            size = sum(rows_per_epoch[name] for name in by_step[step])
            raise ValueError(
                f"max_epochs: got {max_epochs:g}; expected text for the {n_rows:,} rows from step "
                f"{step} on: {', '.join(by_step[step])} have {size:,} rows, and "
                f"{sum(room[name] for name in by_step[step]):,} are left within the limit; give "
                "more text, fewer steps or more epochs"
            )
        found[step] = {name: counts[name] for name in by_step[step] if counts[name]}
        for name, count in counts.items():
            room[name] = max(room[name] - -(-count * n_rows // parts), 0)
    return found


def _fill(weights: Weights, most: Mapping[str, int], n_rows: int) -> dict[str, int] | None:
    """Divide rows in proportion to weights, at most some to each; None if the limits are below."""
    counts: dict[str, int] = {}
    shares = _shares(weights)
    while shares:
        left = n_rows - sum(counts.values())
        total = sum(shares.values())
        full = [name for name, share in shares.items() if left * share > most[name] * total]
        if not full:
            exact = [left * share / total for share in shares.values()]
            return counts | dict(zip(shares, round_shares(exact), strict=True))
        counts |= {name: most[name] for name in full}
        shares = {name: share for name, share in shares.items() if name not in full}
    return counts if sum(counts.values()) == n_rows else None


def _shares(weights: Weights) -> dict[str, Fraction]:
    """Return the weights as exact numbers, by their decimal representation, with a sum of 1."""
    exact = {name: Fraction(Decimal(str(float(weight)))) for name, weight in weights.items()}
    total = sum(exact.values())
    return {name: weight / total for name, weight in exact.items()}


def round_shares(exact: Sequence[Fraction]) -> list[int]:
    """Round numbers to whole ones with the same sum by the largest-remainder method.

    Parameters
    ----------
    exact : sequence of Fraction
        Numbers whose sum is whole.

    Examples
    --------
    >>> round_shares([Fraction(5, 3), Fraction(4, 3)])
    [2, 1]
    """
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: int(sum(exact)) - sum(counts)]:
        counts[i] += 1
    return counts


def rows_per_period(weights: Weights) -> list[int]:
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
    shares = _shares(weights)
    period = math.lcm(*(share.denominator for share in shares.values()))
    counts = round_shares([share * min(period, MAX_PERIOD) for share in shares.values()])
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
