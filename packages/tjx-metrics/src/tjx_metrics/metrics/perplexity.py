"""Convert losses to perplexity, bits per token and bits per byte, on the host in float64.

The mean loss of a corpus is (sum over all tokens) / (number of tokens), not a mean of batch means:
add the sums of all batches first, then pass the quotient to these functions.
"""

import math
from typing import SupportsFloat


def perplexity(mean_nll: SupportsFloat) -> float:
    """Convert a mean loss per token to perplexity.

    Parameters
    ----------
    mean_nll : float-like scalar
        Mean negative log-likelihood, nats per token.

    Returns
    -------
    float
        ``exp(mean_nll)``; inf if this exceeds float64.

    Examples
    --------
    >>> round(perplexity(3.0), 3)
    20.086
    """
    try:
        return math.exp(float(mean_nll))
    except OverflowError:
        return math.inf


def bits_per_token(mean_nll: SupportsFloat) -> float:
    """Convert a mean loss per token from nats to bits.

    Parameters
    ----------
    mean_nll : float-like scalar
        Mean negative log-likelihood, nats per token.

    Returns
    -------
    float
        ``mean_nll / ln 2``.

    Examples
    --------
    >>> round(bits_per_token(3.0), 3)
    4.328
    """
    return float(mean_nll) / math.log(2.0)


def bits_per_byte(total_nll_nats: SupportsFloat, n_bytes: int) -> float:
    """Compute bits per byte of the predicted text.

    Unlike perplexity, bits per byte are comparable between tokenizers and with compressors.

    Parameters
    ----------
    total_nll_nats : float-like scalar
        Sum of the negative log-likelihoods of all predicted tokens, nats.
    n_bytes : int
        UTF-8 bytes of the predicted tokens. Exclude the bytes of tokens without a loss, such as a
        first token without context.

    Returns
    -------
    float
        ``total_nll_nats / ln 2 / n_bytes``.

    Raises
    ------
    ValueError
        If `n_bytes` is not positive.

    Examples
    --------
    A uniform distribution over bytes has 8 bits per byte:

    >>> round(bits_per_byte(1000 * math.log(256), 1000), 6)
    8.0
    """
    if n_bytes < 1:
        raise ValueError(
            f"n_bytes: got {n_bytes}; expected at least 1; count the bytes of the predicted text"
        )
    return float(total_nll_nats) / math.log(2.0) / int(n_bytes)
