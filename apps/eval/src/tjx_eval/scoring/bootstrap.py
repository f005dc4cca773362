"""Paired difference of two models' losses, with bootstrap confidence interval.

The documents are the random sample: difficulty varies between documents, and tokens of one document
are correlated. The error is therefore computed over whole documents, paired between the models
(Dror et al. 2018, "The Hitchhiker's Guide to Testing Statistical Significance in NLP", section
3.2).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 10_000
_MAX_INDICES = 1 << 22  # indices in memory at once
_INTERVAL = (2.5, 97.5)  # percentiles


class Difference(NamedTuple):
    """Difference of two mean losses, B - A: negative if B is better.

    Attributes
    ----------
    mean : float
        Sum of the differences divided by the sum of the sizes.
    standard_error : float
        Standard error of this ratio.
    low, high : float
        95 % bootstrap percentile interval.
    """

    mean: float
    standard_error: float
    low: float
    high: float


def paired_difference(
    differences: NDArray[np.float64], sizes: NDArray[np.int64], *, seed: int = 0
) -> Difference | None:
    """Estimate the difference of two models' mean losses from per-document differences.

    Parameters
    ----------
    differences : float64 [documents]
        Sum of the losses of model B on each document minus that of model A.
    sizes : int64 [documents]
        Tokens or bytes of each document.
    seed : int
        Seed of the resampling.

    Returns
    -------
    Difference or None
        Loss per token or byte; None for fewer than two documents.
    """
    count, total = len(sizes), int(sizes.sum())
    if count < 2:
        return None
    mean = float(differences.sum()) / total
    # Linearized variance of a ratio (Cochran 1977, "Sampling Techniques", section 2.11).
    residuals = differences - mean * sizes
    error = float(np.sqrt((residuals**2).sum() * count / (count - 1))) / total
    rng = np.random.default_rng(seed)
    chunk = max(1, _MAX_INDICES // count)
    means = np.concatenate([
        differences[drawn].sum(1) / sizes[drawn].sum(1)
        for first in range(0, _RESAMPLES, chunk)
        for drawn in [rng.integers(0, count, (min(chunk, _RESAMPLES - first), count))]
    ])  # fmt: skip
    low, high = np.percentile(means, _INTERVAL)
    return Difference(mean, error, float(low), float(high))
