"""Input of a model: checks of tokens, positions and padding, and the embedding.

Axes in names: B batch, T time, D d_model.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Int

from tjx_nn.config import TransformerConfig
from tjx_nn.id_checks import check_ids
from tjx_nn.inputs import Ids, Mask, Positions, TokenMetadata
from tjx_nn.layers.dropout import dropout
from tjx_nn.layers.norms import LayerNorm, RMSNorm
from tjx_nn.layers.position_encoding import sinusoids
from tjx_nn.layout import RESIDUAL_AXES, Layout, ShardedModule, make_param

# Segment id of padding tokens; documents never use it.
_PADDING_SEGMENT = np.iinfo(np.int32).min


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
    x
        Token embeddings (or patches of an image), float32, in device order.
    positions
        Position of each token; None counts from 0 in every row.
    table, norm, dropout_key
        Learned positions, norm of the sum, and PRNG key of dropout, if any.
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


def make_token_metadata(
    config: TransformerConfig,
    tokens: Ids,
    positions: Positions | None,
    mask: Mask | None,
    segment_ids: Ids | None,
    *,
    vocab_size: int,
) -> TokenMetadata:
    """Validate token ids and resolve default positions and the padding mask.

    Raises
    ------
    ValueError
        As `check_tokens`.
    """
    check_tokens(config, tokens, positions, vocab_size=vocab_size)
    if positions is None:
        positions = default_positions(tokens.shape[1], segment_ids)
    return TokenMetadata(jnp.asarray(positions), merge_mask(mask, segment_ids))


def lookup_positions(
    inputs: Mapping[str, object], metadata: TokenMetadata
) -> Int[Array, "#B T"] | None:
    """Return the positions to look up in a table, or None if every row counts from 0."""
    is_default = inputs.get("positions") is None and inputs.get("segment_ids") is None
    return None if is_default else metadata.positions


def check_tokens(
    config: TransformerConfig, tokens: Ids, positions: Positions | None, *, vocab_size: int
) -> None:
    """Check the sequence length, the token ids and the positions of a batch.

    Raises
    ------
    ValueError
        If the sequence exceeds `max_seq_len`, or an id or position is out of range. Traced ids
        are checked with ``config.check_ids`` only.
    """
    if tokens.shape[1] > config.max_seq_len:
        raise ValueError(
            f"tokens: got a sequence of {tokens.shape[1]} tokens; expected at most max_seq_len "
            f"{config.max_seq_len}; shorten the sequence or increase max_seq_len"
        )
    if config.check_ids or not isinstance(tokens, jax.core.Tracer):
        check_ids("token ids", tokens, vocab_size, "vocab_size", traced=config.check_ids)
    if positions is not None:
        limit = config.max_seq_len
        check_ids("positions", positions, limit, "max_seq_len", traced=config.check_ids)


def merge_mask(mask: Mask | None, segment_ids: Ids | None) -> Int[Array, "B T"] | None:
    """Merge a padding mask into segment ids: padding becomes a segment of its own.

    Returns None without a mask and without segments. With a mask alone, real tokens are segment 0.
    """
    if mask is None:
        return None if segment_ids is None else jnp.asarray(segment_ids)
    documents = 0 if segment_ids is None else jnp.asarray(segment_ids).astype(jnp.int32)
    return jnp.where(jnp.asarray(mask) != 0, documents, _PADDING_SEGMENT)


def default_positions(length: int, segment_ids: Ids | None) -> Int[Array, "_ T"]:
    """Count positions from 0, restarting at every segment."""
    index_1T = jnp.arange(length)[None, :]
    if segment_ids is None:
        return index_1T
    segment_ids = jnp.asarray(segment_ids)
    starts_BT = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return index_1T - jax.lax.cummax(jnp.where(starts_BT, index_1T, 0), axis=1)
