"""Laws of the loss, fitted to a few runs, and predictions with an interval.

The law is L = E + A x^-a, for the training FLOPs x of runs along the dial, or with a term for each
of parameters and tokens, L = E + A N^-a + B D^-b (Hoffmann et al. 2022, "Training Compute-Optimal
Large Language Models", section 3.3). As there, the Huber loss of the differences of log L is
minimized: here over a grid of exponents that is refined, with the coefficients of each exponent by
reweighted least squares, which finds the global minimum of so few parameters. Runs far above the
floor E do not determine it: the law has one only if Akaike's criterion prefers it.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tjx_core import ConfigError

Array = NDArray[np.float64]

EXPONENTS = (0.02, 1.5)  # range of the exponents
HUBER = 3e-3  # differences of log L above this count linearly
MIN_NOISE = 1e-3  # least standard deviation of log L between runs: that of seeds is not less
MIN_FREEDOM = 2  # runs more than parameters of the law, for an interval
_GRID, _REFINEMENTS, _REWEIGHTINGS = 40, 3, 3
_AT_ONCE = 20_000  # fits in memory at a time


@dataclass(frozen=True)
class Law:
    """A fitted law of the loss.

    Attributes
    ----------
    floor : float
        E, the loss in the limit [nats per token]; 0 if the runs do not determine it.
    coefficients : tuple of float
        A of each feature, of the feature divided by its `scales`.
    exponents : tuple of float
        a of each feature.
    scales : tuple of float
        Geometric mean of each feature over the fitted runs.
    noise : float
        Standard deviation of log L of the runs around the law, corrected for fitted parameters.
    """

    floor: float
    coefficients: tuple[float, ...]
    exponents: tuple[float, ...]
    scales: tuple[float, ...]
    noise: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Law":
        """Return the law whose `dataclasses.asdict` was written as JSON.

        Parameters
        ----------
        values : mapping of str to Any
            Values by name; tuples are lists.
        """
        tuples: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in values.items()
        }
        return cls(**tuples)

    def loss(self, features: Array) -> Array:
        """Return the loss of the law.

        Parameters
        ----------
        features : array [runs, features]
            Features of runs, as for `fit_law`.

        Returns
        -------
        array [runs]
            Losses [nats per token].

        Examples
        --------
        >>> Law(2.0, (1.0,), (0.5,), (100.0,), 0.0).loss(np.array([[400.0]]))
        array([2.5])
        """
        terms = (features / np.array(self.scales)) ** -np.array(self.exponents)
        losses: Array = self.floor + terms @ np.array(self.coefficients)
        return losses


@dataclass(frozen=True)
class Prediction:
    """A prediction of the loss of a run.

    Attributes
    ----------
    loss : float
        Loss by the law [nats per token].
    low, high : float
        Ends of the interval.
    law : Law
        The fitted law.
    """

    loss: float
    low: float
    high: float
    law: Law


def fit_law(features: Array, losses: Array) -> Law:
    """Fit a law to runs.

    Parameters
    ----------
    features : array [runs, 1 or 2]
        Training FLOPs, or parameters and tokens, of each run.
    losses : array [runs]
        Final losses [nats per token].

    Returns
    -------
    Law
        The law with the lowest Huber loss. Its floor is 0 unless a floor lowers the information
        criterion of Akaike (1974, "A new look at the statistical model identification"), as a floor
        that fits the noise of the runs would spoil extrapolations.

    Raises
    ------
    ConfigError
        If there are too few runs for the parameters of the law, or a loss is not a positive number.

    Examples
    --------
    >>> flops = np.geomspace(1e12, 1e15, 5)[:, None]
    >>> law = fit_law(flops, 1.5 + 40 * flops[:, 0] ** -0.15)
    >>> round(law.floor, 2), [round(a, 3) for a in law.exponents]
    (1.5, [0.15])
    """
    runs, params = len(losses), 1 + 2 * features.shape[1]
    distinct = len(np.unique(features, axis=0))
    if distinct <= params:
        raise ConfigError([
            f"fit: got {distinct} different runs; expected at least {params + 1} for the {params} "
            "parameters of the law; give a larger --scale.depth or --scale.flops"
        ])  # fmt: skip
    if not (np.isfinite(losses).all() and (losses > 0).all()):
        raise ConfigError([f"fit: got losses {losses.tolist()}; expected positive numbers"])
    scales = np.exp(np.log(features).mean(axis=0))
    law, none = (_fitted(features, losses, scales, floor) for floor in (True, False))
    residuals = np.abs([np.log(losses / each.loss(features)) for each in (law, none)])
    # One failed run must not decide: differences above five medians count as five.
    residuals = np.minimum(residuals, max(5 * np.median(residuals[0]), MIN_NOISE))
    with_floor, without = runs * np.log(np.square(residuals).mean(axis=1) + MIN_NOISE**2)
    return law if with_floor + 2 < without else none


def _fitted(features: Array, losses: Array, scales: Array, floor: bool) -> Law:
    exponents, coefficients = _fit(features / scales, losses[None], floor=floor)
    own = tuple(coefficients[0, 1:].tolist()), tuple(exponents[0].tolist())
    law = Law(float(coefficients[0, 0]), *own, tuple(scales.tolist()), MIN_NOISE)
    squares = np.square(np.log(losses / law.loss(features)))
    noise = float(np.sqrt(squares.sum() / (len(losses) - floor - 2 * features.shape[1])))
    return replace(law, noise=max(noise, MIN_NOISE))


def predict_loss(
    features: Array,
    losses: Array,
    target: Array,
    *,
    confidence: float = 0.95,
    samples: int = 500,
    seed: int = 0,
) -> Prediction:
    """Predict the loss of a larger run, with an interval from a parametric bootstrap.

    Each sample draws the noise's variance by its chi-squared distribution (few runs determine it
    badly), new losses of the small runs, a law with a floor fitted to them, and the noise of the
    large run. The interval reaches as far down as up, as ratios. It contains the errors of the runs
    and of the fit; it does not contain a law that stops to hold between the runs and the target.

    Parameters
    ----------
    features, losses
        As for `fit_law`.
    target : array [1 or 2]
        Features of the larger run.
    confidence : float
        Probability of the interval.
    samples : int
        Number of bootstrap samples.
    seed : int
        Seed of the samples.

    Returns
    -------
    Prediction
        Loss and interval.

    Raises
    ------
    ConfigError
        As from `fit_law`, and if the runs do not determine the noise.

    Examples
    --------
    >>> flops = np.geomspace(1e12, 1e15, 5)[:, None]
    >>> losses = 1.5 + 40 * flops[:, 0] ** -0.15
    >>> found = predict_loss(flops, losses, np.array([1e16]), samples=100)
    >>> found.low < 1.5 + 40 * 1e16**-0.15 < found.high
    True
    """
    law = fit_law(features, losses)
    rng = np.random.default_rng(seed)
    freedom = len(losses) - 1 - 2 * features.shape[1]
    if freedom < MIN_FREEDOM:
        raise ConfigError([
            f"predict: got {len(losses)} runs; expected at least "
            f"{len(losses) - freedom + MIN_FREEDOM}, as fewer do not determine an interval"
        ])  # fmt: skip
    noise = law.noise * np.sqrt(freedom / rng.chisquare(freedom, samples))
    drawn = law.loss(features) * np.exp(noise[:, None] * rng.normal(size=(samples, len(losses))))
    scales = np.array(law.scales)
    exponents, coefficients = _fit(features / scales, drawn, floor=True)
    terms = (target / scales) ** -exponents
    fitted = coefficients[:, 0] + (coefficients[:, 1:] * terms).sum(axis=1)
    outcomes = fitted * np.exp(noise * rng.normal(size=samples))
    low, high = np.quantile(outcomes, [(1 - confidence) / 2, (1 + confidence) / 2])
    loss = float(law.loss(target[None])[0])
    # A floor is not negative, so no sample falls faster than a power; the losses may.
    low = min(low, loss**2 / high)
    return Prediction(loss, float(low), float(high), law)


def _fit(features: Array, losses: Array, *, floor: bool) -> tuple[Array, Array]:
    """Return exponents [samples, features] and coefficients [samples, 1 + features].

    Without `floor`, the first coefficient is 0.

    Parameters
    ----------
    features : array [runs, features]
        Features with a geometric mean of 1.
    losses : array [samples, runs]
        Losses of each sample.
    """
    count = features.shape[1]
    axis = np.geomspace(*EXPONENTS, _GRID)
    grid = np.array(list(itertools.product(axis, repeat=count)))
    offsets = np.array(list(itertools.product(np.linspace(-1, 1, 7), repeat=count)))
    found = []
    for some in np.array_split(losses, -(-len(losses) * len(grid) // _AT_ONCE)):
        tried, step = np.broadcast_to(grid, (len(some), *grid.shape)), np.log(axis[1] / axis[0])
        for _ in range(1 + _REFINEMENTS):
            exponents, coefficients = _best(features, some, tried, floor)
            tried = np.clip(exponents[:, None] * np.exp(step * offsets), *EXPONENTS)
            step /= 3
        found.append((exponents, coefficients))
    exponents, coefficients = (np.concatenate(each) for each in zip(*found, strict=True))
    return exponents, coefficients


def _best(features: Array, losses: Array, exponents: Array, floor: bool) -> tuple[Array, Array]:
    """Return the best of some exponents [samples, tried, features] and its coefficients."""
    samples, tried, count = exponents.shape
    terms = np.exp(-exponents[:, :, None] * np.log(features))  # [samples, tried, runs, features]
    design = np.concatenate([np.full_like(terms[..., :1], floor), terms], axis=3)
    design = (design / losses[:, None, :, None]).reshape(samples * tried, -1, 1 + count)
    weights = np.ones(design.shape[:2])
    for _ in range(_REWEIGHTINGS):
        coefficients = _solve(design, weights)
        with np.errstate(divide="ignore"):
            residuals = np.abs(np.log((design @ coefficients[..., None])[..., 0]))
        weights = np.minimum(1, HUBER / np.maximum(residuals, 1e-12))
    costs = np.where(residuals < HUBER, residuals**2 / 2, HUBER * (residuals - HUBER / 2))
    best = costs.sum(axis=1).reshape(samples, tried).argmin(axis=1)
    at = np.arange(samples)
    return exponents[at, best], coefficients.reshape(samples, tried, -1)[at, best]


def _solve(design: Array, weights: Array) -> Array:
    """Return the weighted least squares of design @ coefficients = 1 without negative ones.

    The best of all subsets of the columns whose solution is not negative, for so few columns.
    """
    tried, _, columns = design.shape
    normal = np.einsum("tr,tri,trj->tij", weights, design, design)
    right = np.einsum("tr,tri->ti", weights, design)
    best, lowest = np.zeros((tried, columns)), np.full(tried, np.inf)
    for size in range(1, columns + 1):
        for chosen in itertools.combinations(range(columns), size):
            index = list(chosen)
            matrix = normal[:, index][:, :, index] + 1e-12 * np.eye(size)
            solved = np.zeros((tried, columns))
            solved[:, index] = np.linalg.solve(matrix, right[:, index, None])[..., 0]
            cost = np.einsum("ti,tij,tj->t", solved, normal, solved)
            cost = cost - 2 * np.einsum("ti,ti->t", solved, right)
            better = (solved >= 0).all(axis=1) & (cost < lowest)
            best[better], lowest[better] = solved[better], cost[better]
    return best
