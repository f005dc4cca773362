"""Language-model head and losses: logits, cross-entropy, auxiliary losses.

Axes in names: D d_model, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from tjx_kernels import linear_cross_entropy
from tjx_nn.config import TransformerConfig
from tjx_nn.inputs import IGNORE_INDEX, check_labels
from tjx_nn.layers.scan_layers import AuxLosses


class Losses(NamedTuple):
    """Losses of a batch.

    Attributes
    ----------
    tokens
        Cross-entropy of each label in nats, [batch, tokens] (of an image model [batch]); 0 for
        ignored labels.
    penalty
        Weighted sum of the auxiliary losses, to be added to the mean of `tokens`.
    aux_losses
        Auxiliary losses and statistics, averaged over layers: "balance_loss", "router_z_loss",
        "indexer_loss", and "dropped", the fraction of expert choices over capacity.
    """

    tokens: Float32[Array, "*labels"]
    penalty: Float32[Array, ""]
    aux_losses: AuxLosses


def combine_losses(
    config: TransformerConfig, tokens: Float32[Array, "*labels"], stack_losses: list[AuxLosses]
) -> Losses:
    """Combine the cross-entropy of each label with the auxiliary losses of each stack of layers."""
    names = sorted({name for each in stack_losses for name in each})
    aux_losses = {
        name: jnp.concatenate([each[name] for each in stack_losses if name in each]).mean()
        for name in names
    }
    weights = aux_loss_weights(config)
    terms = [weights[name] * value for name, value in aux_losses.items() if name in weights]
    return Losses(tokens, sum(terms, start=jnp.zeros((), jnp.float32)), aux_losses)


def aux_loss_weights(config: TransformerConfig) -> dict[str, float]:
    """Return the weight of each auxiliary loss in `Losses.penalty`."""
    return {
        "balance_loss": config.experts.balance_loss,
        "router_z_loss": config.experts.z_loss,
        "indexer_loss": config.sparse.loss,
    }


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


@jax.named_scope("loss")  # profiles group operations by this scope
def head_losses(
    x: Float[Array, "*any D"],
    table_VD: Float[Array, "V D"],
    labels: Int[Array | np.ndarray, "*any"],
    *,
    bias: Float32[Array, " V"] | None = None,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    token_shards: int = 1,
    keep_logits: bool | None = None,
) -> Float32[Array, "*any"]:
    """Compute the cross-entropy of labels from hidden states, without materializing all logits.

    Parameters
    ----------
    x, bias, soft_cap, vocab_size
        As for `head_logits`.
    table_VD
        Output embeddings, float32: their gradient is summed in float32.
    labels
        Label of each hidden state; the loss of -100 is 0.
    token_shards, keep_logits
        As for `Layout`.

    Raises
    ------
    ValueError
        Outside of `jax.jit`, if a label has no row in the table.
    """
    check_labels(labels, vocab_size or len(table_VD))
    losses = linear_cross_entropy(
        x,
        table_VD,
        jnp.asarray(labels),
        bias=bias,
        soft_cap=soft_cap,
        vocab_size=vocab_size,
        ignore_index=IGNORE_INDEX,
        token_shards=token_shards,
        keep_logits=keep_logits,
    )
    assert isinstance(losses, Array)  # the log-sum-exp is not requested
    return losses
