"""Types of the token inputs of models.

Axes in names: B batch, T time.
"""

from typing import NamedTuple, TypedDict

import numpy as np
from jaxtyping import Array, Bool, Int

Ids = Int[Array | np.ndarray, "B T"]
Positions = Int[Array | np.ndarray, "#B T"]
Mask = Bool[Array | np.ndarray, "B T"] | Int[Array | np.ndarray, "B T"]


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
    """Keyword arguments of a decoder; see `GPT.__call__`."""

    positions: Positions | None
    segment_ids: Ids | None
    dropout_key: Array | None
