"""Token inputs of models: type aliases, keyword arguments, validation and token metadata.

Axes in names: B batch, T time, S source tokens.
"""

from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from tjx_nn.config import TransformerConfig

Ids = Int[Array | np.ndarray, "B T"]
SourceIds = Int[Array | np.ndarray, "B S"]
Positions = Int[Array | np.ndarray, "#B T"]
Mask = Bool[Array | np.ndarray, "B T"] | Int[Array | np.ndarray, "B T"]
SourceMask = Bool[Array | np.ndarray, "B S"] | Int[Array | np.ndarray, "B S"]

# Label that the loss ignores.
IGNORE_INDEX = -100
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


class TokenInputs(TypedDict, total=False):
    """Keyword arguments of encoders, and of the target of an encoder-decoder.

    Attributes
    ----------
    mask
        Padding mask, [batch, tokens]: False or 0 for padding tokens, which no other token sees.
    segment_ids
        Document of each token in a packed row, [batch, tokens]. Tokens attend only within their
        document; cross attention only to the same document of the source.
    positions
        Position of each token. None counts from 0, restarting at every segment.
    dropout_key
        PRNG key of this step's dropout; None disables dropout (evaluation).
    """

    mask: Mask | None
    segment_ids: Ids | None
    positions: Positions | None
    dropout_key: Array | None


class BertInputs(TokenInputs, total=False):
    """Keyword arguments of BERT.

    Attributes
    ----------
    token_types
        Token type (sentence A or B) of each token, [batch, tokens]; None is type 0.
    """

    token_types: Ids | None


class SourceInputs(TypedDict, total=False):
    """Keyword arguments of the source of an encoder-decoder; see `TokenInputs`."""

    source_mask: SourceMask | None
    source_segment_ids: SourceIds | None
    source_positions: Positions | None
    dropout_key: Array | None


class EncoderDecoderInputs(TokenInputs, SourceInputs, total=False):
    """Keyword arguments of an encoder-decoder: those of its target and of its source."""


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
    inputs: GPTInputs | TokenInputs, metadata: TokenMetadata
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
        If the sequence exceeds `max_seq_len`, or an id or position is out of range (see
        `check_ids`).
    """
    if tokens.shape[1] > config.max_seq_len:
        raise ValueError(
            f"tokens: got a sequence of {tokens.shape[1]} tokens; expected at most max_seq_len "
            f"{config.max_seq_len}; shorten the sequence or increase max_seq_len"
        )
    traced = config.check_ids
    check_ids("token ids", tokens, vocab_size, "vocab_size", traced=traced)
    if positions is not None:
        check_ids("positions", positions, config.max_seq_len, "max_seq_len", traced=traced)


def check_ids(
    name: str,
    ids: Int[Array | np.ndarray, "*any"],
    limit: int,
    limit_name: str,
    *,
    traced: bool = False,
) -> None:
    """Check that all ids are in [0, limit).

    Parameters
    ----------
    name, limit_name
        Names of the ids and of the limit in the error message.
    ids
        Token ids, token types or positions.
    limit
        Number of valid ids.
    traced
        Also check traced ids, by a callback at run time that raises a `JaxRuntimeError` with the
        same message. By default traced ids are not checked.

    Raises
    ------
    ValueError
        If a concrete id is out of range.
    """

    def check(least: Any, largest: Any) -> None:
        low, high = (int(np.asarray(value)) for value in (least, largest))
        if low < 0 or high >= limit:
            raise ValueError(
                f"{name}: got values from {low} to {high}; expected 0 to {limit - 1} "
                f"({limit_name} is {limit}); correct the ids or increase {limit_name}"
            )

    if ids.size == 0:
        return
    if not isinstance(ids, jax.core.Tracer):
        values = np.asarray(jax.device_get(ids))
        check(values.min(), values.max())
    elif traced:
        jax.debug.callback(check, ids.min(), ids.max())


def check_labels(labels: Int[Array | np.ndarray, "*any"], count: int) -> None:
    """Check that all labels are in [0, count) or -100; traced labels are not checked.

    Raises
    ------
    ValueError
        If a label is out of range.
    """
    if isinstance(labels, jax.core.Tracer):
        return
    values = np.asarray(jax.device_get(labels))
    wrong = values[((values < 0) | (values >= count)) & (values != IGNORE_INDEX)]
    if wrong.size:
        raise ValueError(
            f"labels: got values from {values.min()} to {values.max()}; expected 0 to "
            f"{count - 1}, or {IGNORE_INDEX} to ignore a position; correct the labels"
        )


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
