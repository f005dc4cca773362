"""Keyword arguments of encoders and encoder-decoders.

Axes in names: B batch, S source tokens.
"""

from typing import TypedDict

import numpy as np
from jaxtyping import Array, Bool, Int

from tjx_nn.inputs import Ids, Mask, Positions

SourceIds = Int[Array | np.ndarray, "B S"]
SourceMask = Bool[Array | np.ndarray, "B S"] | Int[Array | np.ndarray, "B S"]


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
