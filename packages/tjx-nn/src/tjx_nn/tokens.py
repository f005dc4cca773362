"""What a model may be given: token ids, and their positions.

Axes in names: B batch, T time.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tjx_nn.config import GPTConfig

Ids = Int[Array | np.ndarray, "B T"]
Positions = Int[Array | np.ndarray, "#B T"]


def check_tokens(config: GPTConfig, tokens: Ids, positions: Positions | None) -> None:
    """Raise ValueError unless the model has a place for every token."""
    if tokens.shape[1] > config.max_seq_len:
        raise ValueError(
            f"the sequence has {tokens.shape[1]} tokens and max_seq_len is {config.max_seq_len}: "
            "give a shorter sequence or a model with a larger max_seq_len"
        )
    check_ids("token ids", tokens, config.vocab_size, "vocab_size")
    if positions is not None:
        check_ids("positions", positions, config.max_seq_len, "max_seq_len")


def check_ids(what: str, ids: Int[Array | np.ndarray, "*any"], limit: int, limit_name: str) -> None:
    """Raise ValueError unless `ids` are from 0 to `limit` - 1; traced ids are let through."""
    if isinstance(ids, jax.core.Tracer) or ids.size == 0:
        return
    values = np.asarray(jax.device_get(ids))
    if values.min() < 0 or values.max() >= limit:
        raise ValueError(
            f"{what} are from {values.min()} to {values.max()} and {limit_name} is {limit}: "
            f"give ids from 0 to {limit - 1}"
        )


def default_positions(length: int, segment_ids: Array | None) -> Int[Array, "_ T"]:
    """Count from 0, and from 0 again where a new segment starts."""
    index_1T = jnp.arange(length)[None, :]
    if segment_ids is None:
        return index_1T
    starts_BT = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return index_1T - jax.lax.cummax(jnp.where(starts_BT, index_1T, 0), axis=1)
