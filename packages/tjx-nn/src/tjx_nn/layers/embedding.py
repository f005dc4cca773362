"""From tables to the residual stream: positions are added, and embeddings normalised and dropped.

Axes in names: B batch, T time, D d_model.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tjx_nn.config import TransformerConfig
from tjx_nn.layers.dropout import drop
from tjx_nn.layers.linear import Embedding
from tjx_nn.layers.norms import LayerNorm, RMSNorm
from tjx_nn.layers.position_encoding import sinusoids
from tjx_nn.layout import RESIDUAL_AXES, Layout


def position_table(config: TransformerConfig, *, rngs: nnx.Rngs) -> Embedding | None:
    """Return the table of learned positions, if the configuration wants one."""
    if config.positions != "learned":
        return None
    return Embedding(
        config.max_seq_len,
        config.d_model,
        axes=("position", "embed"),
        std=config.init_std,
        rngs=rngs,
    )


@jax.named_scope("embedding")  # as profiles and plans name it
def embed(
    config: TransformerConfig,
    x: Float[Array, "B T D"],
    positions: Int[Array, "#B T"] | None,
    table: Embedding | None,
    *,
    norm: LayerNorm | RMSNorm | None = None,
    dropout_key: Array | None = None,
    layout: Layout,
) -> Float[Array, "B T D"]:
    """Return the residual stream before the first block, in the configuration's dtype.

    Parameters
    ----------
    config
        Sizes and choices.
    x
        What is known of each token but its position.
    positions
        Of each token; None counts from 0 in every row.
    table
        Learned positions.
    norm
        Normalises the sum, before dropout.
    dropout_key
        Drops features, if the configuration wants that.
    layout
        Where the stream lies.
    """
    length = x.shape[1]
    if table is not None:
        # The gradient of a slice needs no scatter.
        if positions is None:
            x = x + layout.reorder(table.rows()[None, :length])
        else:
            x = x + table(positions)
    elif config.positions == "sinusoidal":
        if positions is None:
            positions = layout.reorder(jnp.arange(length)[None])
        x = x + sinusoids(positions, config.d_model)
    if norm is not None:
        x = norm(x)
    x = layout.place(x.astype(config.dtype), RESIDUAL_AXES)
    rate = config.dropout if config.embedding_dropout is None else config.embedding_dropout
    return drop(x, rate, dropout_key, layout)
