"""Logits of an output head, and their cross-entropy.

Axes in names: D d_model, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from tjx_nn.id_checks import IGNORE_INDEX


def cross_entropy(
    logits: Float[Array, "*batch V"],
    labels: Int[Array, "*batch"],
    *,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
) -> Float32[Array, "*batch"]:
    """Compute the softmax cross-entropy of integer labels, optionally with z-loss.

    For training with a large vocabulary prefer `tjx_kernels.linear_cross_entropy`, which does not
    materialize the logits.

    Parameters
    ----------
    logits
        Unnormalized log-probabilities.
    labels
        Class of each position.
    ignore_index
        Label of positions whose loss is 0.
    z_loss
        Weight of the squared log-sum-exp of the logits, which keeps it near 0 (Chowdhery et al.
        2022, "PaLM", section 5).

    Returns
    -------
    Array
        Loss of each label in nats, float32, not averaged.

    Examples
    --------
    >>> from tjx_nn import cross_entropy
    >>> logits, labels = jnp.zeros((3, 4)), jnp.array([0, 3, -100])
    >>> print(cross_entropy(logits, labels, z_loss=1e-4).round(4))
    [1.3865 1.3865 0.    ]
    """
    logits = logits.astype(jnp.float32)
    is_valid = labels != ignore_index
    lse = jax.nn.logsumexp(logits, -1)
    target = jnp.take_along_axis(logits, jnp.where(is_valid, labels, 0)[..., None], -1)[..., 0]
    return jnp.where(is_valid, lse - target + z_loss * jnp.square(lse), 0.0)


def head_logits(
    x: Float[Array, "*any D"],
    table_VD: Float[Array, "V D"],
    *,
    bias: Float32[Array, " V"] | None = None,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    tokenizer_size: int | None = None,
) -> Float32[Array, "*any vocab"]:
    """Compute float32 logits of an output head.

    Parameters
    ----------
    x
        Hidden states.
    table_VD
        Output embeddings.
    bias
        Added to the logits.
    soft_cap
        Bound of the logits, ``soft_cap * tanh(logits / soft_cap)``; None is unbounded.
    vocab_size
        Number of rows to use; None is all.
    tokenizer_size
        Ids from here on are not tokens: their logits are -inf. None is all.
    """
    y = jnp.einsum("...d,vd->...v", x, table_VD.astype(x.dtype), preferred_element_type=jnp.float32)
    y = y[..., :vocab_size]
    if bias is not None:
        y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
    if soft_cap is not None:
        y = soft_cap * jnp.tanh(y / soft_cap)
    if tokenizer_size is None:
        return y
    is_token = jnp.arange(y.shape[-1]).reshape((1,) * (y.ndim - 1) + (-1,)) < tokenizer_size
    return jnp.where(is_token, y, -jnp.inf)
