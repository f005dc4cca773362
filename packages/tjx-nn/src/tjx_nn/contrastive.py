"""Contrastive loss of pairs.

Axes in names: N pairs, D features.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from tjx_nn.logits import cross_entropy


def info_nce(
    queries_ND: Float[Array, "..."],
    keys_ND: Float[Array, "..."],
    *,
    temperature: float | Float[Array, ""] = 0.07,
    symmetric: bool = False,
) -> Float32[Array, " N"]:
    """Compute the InfoNCE loss of matching rows, with the other rows of the batch as negatives.

    van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding"; with
    `symmetric`, the loss of CLIP (Radford et al. 2021).

    Parameters
    ----------
    queries_ND, keys_ND
        Embeddings; row n of the keys is the positive of row n of the queries. Rows are normalized
        here: their similarity is the cosine.
    temperature
        Divisor of the similarities; may be a trainable scalar.
    symmetric
        Whether to average with the loss of the keys as queries.

    Returns
    -------
    Array
        Loss of each pair in nats, float32, not averaged.

    Raises
    ------
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> from tjx_nn import info_nce
    >>> print(info_nce(jnp.eye(3), jnp.eye(3), temperature=0.5).round(4))
    [0.2395 0.2395 0.2395]
    """
    if queries_ND.ndim != 2 or queries_ND.shape != keys_ND.shape:
        raise ValueError(
            f"queries_ND, keys_ND: got shapes {queries_ND.shape} and {keys_ND.shape}; expected "
            "equal shapes [pairs, features]; give one positive key per query"
        )
    logits_NN = _normalized(queries_ND) @ _normalized(keys_ND).T / temperature
    positives = jnp.arange(len(logits_NN))
    losses: Array = cross_entropy(logits_NN, positives)
    if symmetric:
        losses = (losses + cross_entropy(logits_NN.T, positives)) / 2
    return losses


def _normalized(x_ND: Float[Array, "N D"]) -> Float32[Array, "N D"]:
    x_ND = x_ND.astype(jnp.float32)
    square_N1 = jnp.sum(jnp.square(x_ND), axis=-1, keepdims=True)
    return x_ND * jnp.where(square_N1 > 0, square_N1, 1.0) ** -0.5  # rows of zeros have gradients
