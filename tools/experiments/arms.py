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


def curve(outcomes: Sequence[Outcome], metric: str) -> tuple[Numbers, Numbers, Numbers]:
    """Return the steps common to all runs, and mean and standard deviation of a metric there."""
    records = [dict(outcome.curves.get(metric, ())) for outcome in outcomes]
    steps = sorted(set.intersection(*(set(record) for record in records)))
    values = np.array([[record[step] for step in steps] for record in records], np.float64)
    spread = values.std(axis=0, ddof=1) if len(records) > 1 else np.zeros(len(steps))
    return np.array(steps, np.float64), values.mean(axis=0), spread
