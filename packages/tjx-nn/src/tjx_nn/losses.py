"""Losses of a language model: cross-entropy of the output head, and auxiliary losses.

Axes in names: D d_model, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from tjx_kernels import linear_cross_entropy
from tjx_nn.config import TransformerConfig
from tjx_nn.id_checks import IGNORE_INDEX, check_labels
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
        "indexer_loss", and "dropped", the fraction of expert choices over capacity; with
        `config.z_loss` also "z_loss", that of the output head, and with `multi_token_loss` of a
        decoder that of the token after next.
    """

    tokens: Float32[Array, "*labels"]
    penalty: Float32[Array, ""]
    aux_losses: AuxLosses


def combine_losses(
    config: TransformerConfig, tokens: Float32[Array, "*labels"], stack_losses: list[AuxLosses]
) -> Losses:
    """Combine cross-entropies with the auxiliary losses of each stack of layers and the head."""
    names = sorted({name for each in stack_losses for name in each})
    aux_losses = {
        name: jnp.concatenate([each[name] for each in stack_losses if name in each]).mean()
        for name in names
    }
    return Losses(tokens, weighted_sum(config, aux_losses), aux_losses)


def weighted_sum(config: TransformerConfig, aux_losses: AuxLosses) -> Float32[Array, ""]:
    """Return the sum of auxiliary losses with their weights in `Losses.penalty`."""
    weights = {
        "balance_loss": config.experts.balance_loss,
        "router_z_loss": config.experts.z_loss,
        "indexer_loss": config.sparse.loss,
        "z_loss": config.z_loss,
        "multi_token_loss": getattr(config, "multi_token_loss", 0.0),  # of decoders
    }
    terms = [weights[name] * value for name, value in aux_losses.items() if name in weights]
    return sum(terms, start=jnp.zeros((), jnp.float32))


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
    z_loss: float = 0.0,
) -> tuple[Float32[Array, "*any"], AuxLosses]:
    """Compute the cross-entropy of labels from hidden states, without materializing all logits.

    The loss of label -100 is 0. The gradient of the output embeddings is summed in float32. The
    options are those of `head_logits` and `Layout`.

    Parameters
    ----------
    z_loss
        Weight of the z-loss; 0 does not compute it.

    Returns
    -------
    tokens
        Cross-entropy of each label in nats, without the z-loss.
    aux_losses
        Empty, or "z_loss", float32 [1]: the mean squared log-sum-exp of the logits of all labels
        but -100 (Chowdhery et al. 2022, "PaLM", section 5), without its weight.

    Raises
    ------
    ValueError
        Outside of `jax.jit`, if a label has no row in the table.
    """
    if not isinstance(labels, jax.core.Tracer):
        check_labels(labels, vocab_size or len(table_VD))
    losses, lse = linear_cross_entropy(
        x,
        table_VD,
        jnp.asarray(labels),
        bias=bias,
        soft_cap=soft_cap,
        vocab_size=vocab_size,
        ignore_index=IGNORE_INDEX,
        token_shards=token_shards,
        keep_logits=keep_logits,
        return_lse=True,
    )
    if not z_loss:
        return losses, {}
    counts = jnp.asarray(labels) != IGNORE_INDEX
    mean = jnp.sum(jnp.square(lse), where=counts) / jnp.maximum(counts.sum(), 1)
    return losses, {"z_loss": mean[None]}
