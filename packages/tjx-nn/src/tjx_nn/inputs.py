"""Token inputs of models: type aliases, token metadata, and the arguments of decoders.

Axes in names: B batch, T time.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from tjx_nn.config import TransformerConfig
from tjx_nn.id_checks import check_ids

Ids = Int[Array | np.ndarray, "B T"]
Positions = Int[Array | np.ndarray, "#B T"]
Mask = Bool[Array | np.ndarray, "B T"] | Int[Array | np.ndarray, "B T"]

# Segment id of padding tokens; documents never use it.
_PADDING_SEGMENT = np.iinfo(np.int32).min


class TokenMetadata(NamedTuple):
    """Per-token inputs of attention: positions and segment ids (with padding as a segment).

    Attributes
    ----------
    positions
        Position of each token.
    segment_ids
        Tokens attend only within their own segment; None is a single segment.
    """

    positions: Int[Array, "#B T"]
    segment_ids: Int[Array, "B T"] | None = None


class GPTInputs(TypedDict, total=False):
    """Keyword arguments of a decoder; see `TokenInputs`."""

    positions: Positions | None
    segment_ids: Ids | None
    dropout_key: Array | None


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
