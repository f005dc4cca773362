"""Statistics over the seeds of an arm: losses, standard deviations and claims."""

import itertools
import math
import statistics
from collections.abc import Sequence

import numpy as np
from experiments.page import Claim
from experiments.runs import Json, Outcome
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


def read_outcomes(results: Json, name: str = "runs") -> list[Outcome]:
    """Read the outcomes of runs from the results JSON."""
    return [Outcome(**record) for record in results[name]]


def by_arm(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Group runs by arm, in order of first appearance."""
    arms: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        arms.setdefault(outcome.arm, []).append(outcome)
    return arms


def final_losses(outcomes: Sequence[Outcome]) -> list[float]:
    """Return the last validation loss of each run, by seed; NaN for a run that did not finish."""
    return [outcome.final_loss for outcome in sorted(outcomes, key=lambda each: each.seed)]


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation; NaN for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """Format the mean and the sample standard deviation of values.

    Examples
    --------
    >>> mean_sd([1.0, 2.0, 3.0], digits=1)
    '2.0 ± 1.0'
    >>> mean_sd([1.0])
    '1.000'
    >>> mean_sd([1.0, float("nan")])
    'not finite'
    """
    if not all(math.isfinite(value) for value in values):
        return "not finite"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {deviation(values):.{digits}f}"


def lower(text: str, less: Sequence[float], more: Sequence[float], digits: int = 3) -> Claim:
    """Claim that the values of one arm are lower than those of another for every seed.

    Parameters
    ----------
    text : str
        Text of the claim; must contain "in every seed".
    less, more : sequence of float
        One value per seed, in the same order. A NaN (a run that did not finish) makes the claim
        fail.
    digits : int
        Decimal places of the figures.

    Examples
    --------
    >>> lower("A is below B in every seed.", [1.0, 2.0], [1.5, 1.9], digits=1).line()
    '- A is below B in every seed. **Does not hold in this run**: 1.5 ± 0.7 against 1.7 ± 0.3.'
    """
    return Claim(
        text=text,
        holds=all(a < b for a, b in zip(less, more, strict=True)),
        figures=f"{mean_sd(less, digits)} against {mean_sd(more, digits)}",
    )


def paired_p_value(less: Sequence[float], more: Sequence[float]) -> float:
    """Return the one-sided p-value of the paired differences `less` - `more`.

    The exact sign-flip test (Fisher 1935): the share of all assignments of signs to the
    differences whose mean is at most that found. 1 if a value is not finite.

    Examples
    --------
    >>> paired_p_value([1.0, 2.0, 3.0], [1.5, 2.5, 3.1])
    0.125
    """
    differences = np.array(less) - np.array(more)
    if not np.isfinite(differences).all():
        return 1.0
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    sums = signs @ np.abs(differences)
    return float(np.mean(sums <= differences.sum() + 1e-12))


def two_sided_p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of paired differences by the sign-flip test.

    Twice the smaller one-sided p-value, at most 1; 1 if a value is not finite.

    Examples
    --------
    >>> two_sided_p_value([-0.5, -0.5, -0.1])
    0.25
    """
    zeros = [0.0] * len(differences)
    one_sided = min(paired_p_value(differences, zeros), paired_p_value(zeros, differences))
    return min(1.0, 2 * one_sided)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for the number of tests (Holm 1979).

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def bootstrap_interval(values: Sequence[float], share: float = 0.95) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of values (Efron 1979).

    10,000 resamples with a fixed seed; NaN if a value is not finite.

    Examples
    --------
    >>> bootstrap_interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    drawn = np.random.default_rng(0).choice(np.array(values), (10_000, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def curve(outcomes: Sequence[Outcome], metric: str) -> tuple[Numbers, Numbers, Numbers]:
    """Return the steps common to all runs, and mean and standard deviation of a metric there."""
    records = [dict(outcome.curves.get(metric, ())) for outcome in outcomes]
    steps = sorted(set.intersection(*(set(record) for record in records)))
    values = np.array([[record[step] for step in steps] for record in records], np.float64)
    spread = values.std(axis=0, ddof=1) if len(records) > 1 else np.zeros(len(steps))
    return np.array(steps, np.float64), values.mean(axis=0), spread
