"""Embedding tables and the input embedding of a model: token, position, norm and dropout.

Axes in names: B batch, T time, D d_model.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Int

from tjx_nn.config import TransformerConfig
from tjx_nn.layers.dropout import dropout
from tjx_nn.layers.norms import LayerNorm, RMSNorm
from tjx_nn.layers.position_encoding import sinusoids
from tjx_nn.layout import RESIDUAL_AXES, Layout, ShardedModule, make_param


class Embedding(ShardedModule):
    """Float32 embedding table; ids outside of the table are clipped.

    Parameters
    ----------
    num
        Number of rows.
    features
        Features of a row.
    axes
        Logical axes of the table.
    std
        Standard deviation of the normal initializer.
    rngs
        Source of random initial values.

    Examples
    --------
    >>> from tjx_nn import Embedding
    >>> table = Embedding(100, 8, rngs=nnx.Rngs(0))
    >>> table(jnp.array([[1, 2, 3]])).shape
    (1, 3, 8)
    """

    def __init__(
        self,
        num: int,
        features: int,
        *,
        axes: tuple[str, str] = ("vocab", "embed"),
        std: float = 0.02,
        rngs: nnx.Rngs,
    ) -> None:
        self.axes = axes
        self.embedding = make_param(normal(std)(rngs.params(), (num, features), jnp.float32), axes)

    @jax.named_scope("embedding")  # profiles and the planner group operations by this scope
    def __call__(
        self, ids: Int[Array, "*any"], rows: Float[Array, "rows D"] | None = None
    ) -> Float[Array, "*any D"]:
        """Look up the rows of `ids`, in float32.

        Parameters
        ----------
        ids
            Row numbers.
        rows
            Result of `rows()`, to share one all-gather of the table with a tied output head.
        """
        return self.layout.look_up(self.rows() if rows is None else rows, ids, self.axes[0])

    def rows(self) -> Float[Array, "rows D"]:
        """Return the table, all-gathered over the mesh axes that shard its features."""
        return self.gather(self.embedding, self.axes)


def position_table(
    config: TransformerConfig, *, rows: int | None = None, rngs: nnx.Rngs
) -> Embedding | None:
    """Make a table of learned positions, by default `max_seq_len`; None without learned ones."""
    if config.positions != "learned":
        return None
    shape, axes = (rows or config.max_seq_len, config.d_model), ("position", "embed")
    return Embedding(*shape, axes=axes, std=config.init_std, rngs=rngs)


@jax.named_scope("embedding")  # profiles and the planner group operations by this scope
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
    """Add positions to token embeddings, then normalize, cast to `config.dtype` and drop out.

    Parameters
    ----------
    config
        Configuration of the model.
    x
        Token embeddings (or patches of an image), float32, in device order.
    positions
        Position of each token; None counts from 0 in every row.
    table
        Table of learned positions, if any.
    norm
        Norm of the sum, if any.
    dropout_key
        PRNG key of dropout; None disables it.
    layout
        Layout of the model.
    """
    length = x.shape[1]
    if table is not None:
        # A slice: unlike a lookup, its gradient is no scatter.
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
    if dropout_key is None:
        return x
    return dropout(x, config.embedding_dropout_rate, dropout_key, layout)
