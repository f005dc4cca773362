"""What may be said of tokens besides which they are: the keyword arguments of models."""

from typing import TypedDict

import jax.numpy as jnp
from jaxtyping import Array, Int

from tjx_nn.attention.mha import TokenMetadata
from tjx_nn.config import TransformerConfig
from tjx_nn.tokens import (
    Ids,
    Mask,
    Positions,
    SourceIds,
    SourceMask,
    check_tokens,
    default_positions,
    padded,
)


class GPTInputs(TypedDict, total=False):
    """Of the tokens of a decoder, as for `TokenInputs`."""

    positions: Positions | None
    segment_ids: Ids | None
    dropout_key: Array | None


class TokenInputs(TypedDict, total=False):
    """Of the tokens that a model reads; of the target, where there is a source.

    Attributes
    ----------
    mask
        False or 0 where a token is padding, which no other token sees.
    segment_ids
        Document that each token belongs to, where several are packed in a row; tokens see only
        their own document, also of the source.
    positions
        Position of each token. None counts from 0, and from 0 again at the start of each segment.
    dropout_key
        Key of this step's dropout. None means no dropout: give a key exactly when training.
    """

    mask: Mask | None
    segment_ids: Ids | None
    positions: Positions | None
    dropout_key: Array | None


class BertInputs(TokenInputs, total=False):
    """Of BERT's tokens.

    Attributes
    ----------
    token_types
        Which of the kinds of segments each token belongs to; None is 0 for all.
    """

    token_types: Ids | None


class SourceInputs(TypedDict, total=False):
    """Of the tokens of a source: the same as of others."""

    source_mask: SourceMask | None
    source_segment_ids: SourceIds | None
    source_positions: Positions | None
    dropout_key: Array | None


class EncoderDecoderInputs(TokenInputs, SourceInputs, total=False):
    """Of a target and its source."""


def table_positions(
    inputs: GPTInputs | TokenInputs, where: TokenMetadata
) -> Int[Array, "#B T"] | None:
    """Return the positions to look up in a table; None where they count from 0 in every row."""
    counted = inputs.get("positions") is None and inputs.get("segment_ids") is None
    return None if counted else where.positions


def make_token_metadata(
    config: TransformerConfig,
    tokens: Ids,
    positions: Positions | None,
    mask: Mask | None,
    segment_ids: Ids | None,
    *,
    vocab_size: int,
) -> TokenMetadata:
    """Return where tokens are, for attention; ValueError if the model has no place for them."""
    check_tokens(config, tokens, positions, vocab_size=vocab_size)
    if positions is None:
        positions = default_positions(tokens.shape[1], segment_ids)
    return TokenMetadata(jnp.asarray(positions), padded(mask, segment_ids))
