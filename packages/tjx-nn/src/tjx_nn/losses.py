"""The output head of a language model, and what training minimises.

Axes in names: D d_model, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from tjx_kernels import linear_cross_entropy
from tjx_nn.attention.mha import AuxLosses
from tjx_nn.config import TransformerConfig
from tjx_nn.tokens import IGNORED, check_labels


class Losses(NamedTuple):
    """What training minimises.

    Attributes
    ----------
    tokens
        Cross-entropy of each label in nats, [batch, tokens] (of an image model [batch]); 0 where it
        is ignored.
    penalty
        Weighted losses of experts and indexer, to be added to the mean of `tokens`.
    measures
        Means over layers of what these report: "balance_loss", "router_z_loss", "indexer_loss", and
        "dropped", the fraction of expert slots that were asked for and full.
    """

    tokens: Float32[Array, "*labels"]
    penalty: Float32[Array, ""]
    aux_losses: AuxLosses


def losses(
    config: TransformerConfig, tokens: Float32[Array, "*labels"], reported: list[AuxLosses]
) -> Losses:
    """Join the cross-entropies with what stacks of layers reported."""
    names = sorted({name for each in reported for name in each})
    aux_losses = {
        name: jnp.concatenate([each[name] for each in reported if name in each]).mean()
        for name in names
    }
    weights = aux_loss_weights(config)
    terms = [weights[name] * value for name, value in aux_losses.items() if name in weights]
    return Losses(tokens, sum(terms, start=jnp.zeros((), jnp.float32)), aux_losses)


def aux_loss_weights(config: TransformerConfig) -> dict[str, float]:
    """Return how much each measure that is a loss weighs."""
    return {
        "balance_loss": config.experts.balance_loss,
        "router_z_loss": config.experts.z_loss,
        "indexer_loss": config.sparse.loss,
    }


def head_logits(
    x: Float[Array, "*any D"],
    table_VD: Float[Array, "V D"],
    *,
    bias: Float32[Array, " V"] | None = None,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    tokenizer_size: int | None = None,
) -> Float32[Array, "*any vocab"]:
    """Multiply hidden vectors with a table, of which `vocab_size` rows count; float32 logits.

    Ids from `tokenizer_size` on are no tokens: their logits are -inf.
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


@jax.named_scope("loss")  # as profiles name it
def head_losses(
    x: Float[Array, "*any D"],
    table_VD: Float[Array, "V D"],
    labels: Int[Array | np.ndarray, "*any"],
    *,
    bias: Float32[Array, " V"] | None = None,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    token_shards: int = 1,
) -> Float32[Array, "*any"]:
    """Return the cross-entropy of each label under `head_logits`.

    The logits are computed in chunks, or kept in the type of x on GPUs with enough memory. Where
    the label is -100 the loss is 0. The table stays float32, so that its gradient is summed in
    float32. `token_shards` is that of the layout. Raises ValueError outside `jax.jit` for labels
    that the table has no row for.
    """
    check_labels(labels, vocab_size or len(table_VD))
    tokens = linear_cross_entropy(
        x,
        table_VD,
        jnp.asarray(labels),
        bias=bias,
        soft_cap=soft_cap,
        vocab_size=vocab_size,
        ignore_index=IGNORED,
        token_shards=token_shards,
    )
    assert isinstance(tokens, Array)  # and no log-sum-exp with it
    return tokens
