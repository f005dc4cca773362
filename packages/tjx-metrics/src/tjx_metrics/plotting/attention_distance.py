"""How far attention looks: a pure function of attention weights."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def attention_distances(weights: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the share of attention that goes to each distance from query to key.

    Parameters
    ----------
    weights : float array [layers, heads, queries, keys]
        Attention after the softmax. Where there are fewer queries than keys, the queries are the
        last ones, as with a cache. Rows of zeros (padding) count nothing.

    Returns
    -------
    float64 array [layers, heads, keys]
        For each head the shares at distance 0, 1, ..., keys - 1, before the query or behind it;
        they sum to 1, or are all 0 where the head attends to nothing.

    Raises
    ------
    ValueError
        When the array has other axes, more queries than keys, or a weight that is negative or not
        finite.

    Examples
    --------
    >>> weights = np.array([[[[1.0, 0.0], [0.5, 0.5]]]])
    >>> attention_distances(weights).tolist()
    [[[0.75, 0.25]]]
    """
    weights = check_weights(weights)
    layers, heads, queries, keys = weights.shape
    places = np.arange(queries)[:, None] + keys - queries
    distance = np.abs(places - np.arange(keys)[None, :]).ravel()
    shares = np.empty((layers, heads, keys))
    for layer in range(layers):
        for head in range(heads):
            of_head = weights[layer, head].ravel().astype(np.float64)
            shares[layer, head] = np.bincount(distance, of_head, minlength=keys)
    total = shares.sum(axis=-1, keepdims=True)
    return np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)


def check_weights(weights: NDArray[Any]) -> NDArray[Any]:
    """Return attention weights as they are; ValueError where they cannot be such."""
    weights = np.asarray(weights)
    if weights.ndim != 4 or not weights.size or weights.shape[2] > weights.shape[3]:
        raise ValueError(
            f"weights of shape {weights.shape}: must be [layers, heads, queries, keys], none "
            "empty, with no more queries than keys"
        )
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("weights: must be finite and at least 0, as they come from the softmax")
    return weights


def mean_distance(shares: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the mean distance, in tokens, from shares [..., distances]; [...] float64."""
    return np.asarray(shares @ np.arange(shares.shape[-1], dtype=np.float64))
