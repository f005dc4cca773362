"""Metrics of a language model, from the loss: pure functions of host numbers, in float64.

A mean over a corpus is (sum over all tokens) / (number of tokens), never a mean of batch means:
add the sums of the batches first, in float64, and hand the quotient to these functions.
"""

import math
from typing import SupportsFloat


def perplexity(mean_nll: SupportsFloat) -> float:
    """Turn the mean loss of a token into perplexity.

    Parameters
    ----------
    mean_nll : float-like scalar
        Mean negative log-likelihood, nats a token.

    Returns
    -------
    float
        ``exp(mean_nll)``; infinite where that is beyond float64.

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
    """Turn the mean loss of a token from nats into bits.

    Parameters
    ----------
    mean_nll : float-like scalar
        Mean negative log-likelihood, nats a token.

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
    """Compute the bits that the model needs for a byte of the text it predicted.

    Unlike perplexity it can be compared between tokenizers, and with a compressor.

    Parameters
    ----------
    total_nll_nats : float-like scalar
        Sum of the negative log-likelihoods of all predicted tokens, nats.
    n_bytes : int
        UTF-8 bytes of the text that the predicted tokens stand for. A text's first token is
        predicted from nothing and usually has no loss; then its bytes do not count either.

    Returns
    -------
    float
        ``total_nll_nats / ln 2 / n_bytes``.

    Raises
    ------
    ValueError
        When `n_bytes` is not positive.

    Examples
    --------
    A model that knows nothing gives each byte a chance of 1/256:

    >>> round(bits_per_byte(1000 * math.log(256), 1000), 6)
    8.0
    """
    if n_bytes < 1:
        raise ValueError(
            f"n_bytes={n_bytes}: must be at least 1; count the bytes of the text that was predicted"
        )
    return float(total_nll_nats) / math.log(2.0) / int(n_bytes)
