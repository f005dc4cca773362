"""The difference of two models on the same texts: its mean, and how sure it is.

What is drawn by chance is the texts: some are hard for both models, and the tokens of one go
together. So the error is that of whole texts, paired (Dror et al. 2018, "The Hitchhiker's Guide to
Testing Statistical Significance in NLP", section 3.2).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_DRAWS = 10_000
_AT_ONCE = 1 << 22  # numbers of draws held in memory
_INTERVAL = (2.5, 97.5)  # percentiles


class Difference(NamedTuple):
    """A difference of two mean losses, B - A: below 0 where B predicts better.

    Attributes
    ----------
    mean : float
        Sum of the differences by the sum of the sizes.
    standard_error : float
        Of that ratio, over texts.
    low, high : float
        Interval that holds 95 % of the means of texts drawn anew (bootstrap percentiles).
    """

    mean: float
    standard_error: float
    low: float
    high: float


def paired_difference(
    differences: NDArray[np.float64], sizes: NDArray[np.int64], *, seed: int = 0
) -> Difference | None:
    """Estimate the difference of the models on texts of this kind.

    Parameters
    ----------
    differences : float64 [texts]
        Sum of the losses of model B on a text less that of A.
    sizes : int64 [texts]
        Its tokens or bytes: what the losses are means over.
    seed : int
        Of the draws.

    Returns
    -------
    Difference or None
        In units of the losses a token or byte; None of a single text, which says nothing of others.
    """
    count, total = len(sizes), int(sizes.sum())
    if count < 2:
        return None
    mean = float(differences.sum()) / total
    # The ratio's variance, linearised (Cochran 1977, "Sampling Techniques", section 2.11).
    residuals = differences - mean * sizes
    error = float(np.sqrt((residuals**2).sum() * count / (count - 1))) / total
    rng = np.random.default_rng(seed)
    chunk = max(1, _AT_ONCE // count)
    means = np.concatenate([
        differences[drawn].sum(1) / sizes[drawn].sum(1)
        for first in range(0, _DRAWS, chunk)
        for drawn in [rng.integers(0, count, (min(chunk, _DRAWS - first), count))]
    ])  # fmt: skip
    low, high = np.percentile(means, _INTERVAL)
    return Difference(mean, error, float(low), float(high))
