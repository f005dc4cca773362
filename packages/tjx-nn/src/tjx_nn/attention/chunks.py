"""Chunked local attention: a token attends only within its chunk of consecutive positions.

Axes in names: B batch, T time, S slots of a cache.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tjx_nn.config import TransformerConfig


def chunk_segments(
    config: TransformerConfig,
    positions: Int[Array, "#B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    window: int,
    shape: tuple[int, ...],
) -> Int[Array, "B T"]:
    """Return segment ids that separate the chunks of each segment.

    Parameters
    ----------
    config
        Configuration of the model: `max_seq_len` bounds the positions.
    positions
        Position of each token; None counts from 0.
    segment_ids
        Segment of each token; None is a single segment.
    window
        Tokens of a chunk.
    shape
        Batch size and number of tokens.
    """
    positions = jnp.arange(shape[1])[None] if positions is None else positions
    chunks = (positions // window).astype(jnp.int32)
    if segment_ids is not None:
        # An odd factor above any chunk: the ids of other segments differ, also where they
        # wrap around, if the segment ids of a row differ by less than 2**32 / most.
        most = (config.max_seq_len // window + 1) | 1
        chunks = segment_ids.astype(jnp.int32) * most + chunks
    return jnp.broadcast_to(chunks, shape[:2])


def is_in_chunk(
    distance: Int[Array, "B T S"], positions: Int[Array, "B T"], window: int
) -> Bool[Array, "B T S"]:
    """Return whether a key this many tokens before a query is in the chunk of the query."""
    return distance <= (positions % window)[..., None]
