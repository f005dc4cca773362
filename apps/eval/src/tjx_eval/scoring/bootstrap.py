"""Means with bootstrap confidence intervals over documents or prompts.

The documents (or prompts) are the random sample: difficulty varies between them, and tokens of one
document, as samples of one prompt, are correlated. The error is therefore computed over whole
documents; for the difference of two models these are paired (Dror et al. 2018, "The Hitchhiker's
Guide to Testing Statistical Significance in NLP", section 3.2).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 10_000
_MAX_INDICES = 1 << 22  # indices in memory at once
_INTERVAL = (2.5, 97.5)  # percentiles


class Estimate(NamedTuple):
    """A mean, and its error.

    Attributes
    ----------
    mean : float
        Sum of the values divided by the sum of the sizes.
    standard_error : float
        Standard error of this ratio.
    low, high : float
        95 % bootstrap percentile interval.
    """

    mean: float
    standard_error: float
    low: float
    high: float


def estimate_mean(
    values: NDArray[np.float64], sizes: NDArray[np.int64], *, seed: int = 0
) -> Estimate | None:
    """Estimate a mean per token, byte or prompt from a sample of documents or prompts.

    Parameters
    ----------
    values : float64 [documents]
        Sum over each document, such as the loss of model B minus that of model A.
    sizes : int64 [documents]
        Tokens or bytes of each document; 1 for prompts.
    seed : int
        Seed of the resampling.

    Returns
    -------
    Estimate or None
        The mean per token or byte; None for fewer than two documents.
    """
    count, total = len(sizes), int(sizes.sum())
    if count < 2:
        return None
    mean = float(values.sum()) / total
    # Linearized variance of a ratio (Cochran 1977, "Sampling Techniques", section 2.11).
    residuals = values - mean * sizes
    error = float(np.sqrt((residuals**2).sum() * count / (count - 1))) / total
    rng = np.random.default_rng(seed)
    chunk = max(1, _MAX_INDICES // count)
    means = np.concatenate([
        values[drawn].sum(1) / sizes[drawn].sum(1)
        for first in range(0, _RESAMPLES, chunk)
        for drawn in [rng.integers(0, count, (min(chunk, _RESAMPLES - first), count))]
    ])  # fmt: skip
    low, high = np.percentile(means, _INTERVAL)
    return Estimate(mean, error, float(low), float(high))
