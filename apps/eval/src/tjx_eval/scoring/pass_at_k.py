"""pass@k: the probability that at least one of k sampled responses passes a verifier."""

import numpy as np
from numpy.typing import NDArray

from tjx_eval.scoring.bootstrap import Estimate, estimate_mean


def pass_at_k(passed: NDArray[np.int64], samples: int, k: int) -> NDArray[np.float64]:
    """Estimate pass@k of each prompt without bias.

    This is the share of the subsets of k responses with one that passed,
    ``1 - C(samples - passed, k) / C(samples, k)``. Source: Chen et al. 2021, "Evaluating Large
    Language Models Trained on Code", equation 1.

    Parameters
    ----------
    passed : int64 [prompts]
        Number of responses to each prompt that passed.
    samples : int
        Number of responses to each prompt.
    k : int
        Number of responses of which one has to pass, at most `samples`.

    Returns
    -------
    float64 [prompts]
        Estimates in [0, 1].

    Raises
    ------
    ValueError
        If k is not in [1, samples].

    Examples
    --------
    >>> print(pass_at_k(np.array([0, 1, 3, 4]), samples=4, k=2))
    [0.  0.5 1.  1. ]
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k: got {k}; expected 1 to {samples}, the number of samples")
    # C(n - c, k) / C(n, k) is the product of the chances that no draw is one of the c.
    drawn = np.arange(k)
    failing = np.maximum(samples - passed[:, None] - drawn, 0)
    found: NDArray[np.float64] = 1 - np.prod(failing / (samples - drawn), axis=1)
    return found


def estimate_pass_at_k(
    passed: NDArray[np.int64], samples: int, k: int, *, seed: int = 0
) -> tuple[float, Estimate | None]:
    """Return the mean of `pass_at_k` over prompts, and its interval, None for one prompt.

    Parameters
    ----------
    passed, samples, k
        As of `pass_at_k`.
    seed : int
        Seed of the bootstrap.
    """
    values = pass_at_k(passed, samples, k)
    return float(values.mean()), estimate_mean(values, np.ones(len(values), np.int64), seed=seed)
