"""What a model may be given: token ids, and their positions.

Axes in names: B batch, T time, S tokens of a source.
"""

from typing import Any

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

# The label of what is not to be predicted.
IGNORED = -100
# The segment of padding: no document has it.
_PADDING = np.iinfo(np.int32).min


def check_tokens(
    config: TransformerConfig, tokens: Ids, positions: Positions | None, *, vocab_size: int
) -> None:
    """Raise ValueError unless the model has a place for every token."""
    if tokens.shape[1] > config.max_seq_len:
        raise ValueError(
            f"the sequence has {tokens.shape[1]} tokens and max_seq_len is {config.max_seq_len}: "
            "give a shorter sequence or a model with a larger max_seq_len"
        )
    traced = config.check_ids
    check_ids("token ids", tokens, vocab_size, "vocab_size", traced=traced)
    if positions is not None:
        check_ids("positions", positions, config.max_seq_len, "max_seq_len", traced=traced)


def check_ids(
    what: str,
    ids: Int[Array | np.ndarray, "*any"],
    limit: int,
    limit_name: str,
    *,
    traced: bool = False,
) -> None:
    """Raise ValueError unless `ids` are from 0 to `limit` - 1.

    Traced ids pass; with `traced` they are checked when the compiled program runs, which then ends
    with an error of JAX's that has the same message.
    """

    def check(least: Any, largest: Any) -> None:
        low, high = (int(np.asarray(value)) for value in (least, largest))
        if low < 0 or high >= limit:
            raise ValueError(
                f"{what} are from {low} to {high} and {limit_name} is {limit}: give ids from 0 to "
                f"{limit - 1}"
            )

    if ids.size == 0:
        return
    if not isinstance(ids, jax.core.Tracer):
        values = np.asarray(jax.device_get(ids))
        check(values.min(), values.max())
    elif traced:
        jax.debug.callback(check, ids.min(), ids.max())


def check_labels(labels: Int[Array | np.ndarray, "*any"], count: int) -> None:
    """Raise ValueError unless `labels` are from 0 to `count` - 1 or -100; traced ones pass."""
    if isinstance(labels, jax.core.Tracer):
        return
    values = np.asarray(jax.device_get(labels))
    wrong = values[((values < 0) | (values >= count)) & (values != IGNORED)]
    if wrong.size:
        raise ValueError(
            f"labels are from {values.min()} to {values.max()} and there are {count} to choose "
            f"from: give 0 to {count - 1}, or {IGNORED} where nothing is to be predicted"
        )


def padded(mask: Mask | None, segment_ids: Ids | None) -> Int[Array, "B T"] | None:
    """Return segments in which padding (where the mask is False or 0) is one of its own.

    None where there is neither a mask nor segments: all tokens are one segment. With a mask alone,
    that segment is 0.
    """
    if mask is None:
        return None if segment_ids is None else jnp.asarray(segment_ids)
    documents = 0 if segment_ids is None else jnp.asarray(segment_ids).astype(jnp.int32)
    return jnp.where(jnp.asarray(mask) != 0, documents, _PADDING)


def default_positions(length: int, segment_ids: Ids | None) -> Int[Array, "_ T"]:
    """Count from 0, and from 0 again where a new segment starts."""
    index_1T = jnp.arange(length)[None, :]
    if segment_ids is None:
        return index_1T
    segment_ids = jnp.asarray(segment_ids)
    starts_BT = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return index_1T - jax.lax.cummax(jnp.where(starts_BT, index_1T, 0), axis=1)
