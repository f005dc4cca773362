"""Which key a query sees: one rule for single elements, one for whole blocks.

Query i has the position offset + i, key j the position j. The elementwise rule is the meaning; the
rules for blocks let a kernel skip what nobody sees and leave out masks where everybody sees all.
All are plain arithmetic on integers and arrays: they serve in XLA programs and within kernels.
"""

from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention.types import AttentionCall

# Python's int or a traced int32 scalar.
type Int = int | jax.Array


def visible(
    call: AttentionCall,
    position: Any,
    key: Any,
    q_ids: jax.Array | None = None,
    kv_ids: jax.Array | None = None,
) -> jax.Array | None:
    """Say which pairs see each other, None where all do.

    `position` of queries, `key` indices and both kinds of segment ids are arrays that broadcast
    against each other. Keys past the end of the sequence are the caller's to hide.
    """
    masks = []
    if call.causal:
        masks.append(key <= position)
    if call.window is not None:
        masks.append(key > position - call.window)
    if q_ids is not None and kv_ids is not None:
        masks.append(q_ids == kv_ids)
    return reduce(jnp.logical_and, masks) if masks else None


class Blocks(NamedTuple):
    """Blocks [start, stop) hold all that is seen; those in [full_start, full_stop) are seen whole.

    start <= full_start <= full_stop <= stop, all within [0, number of blocks]. Segment ids are not
    considered: where there are any, no block may be taken for wholly seen.
    """

    start: Int
    full_start: Int
    full_stop: Int
    stop: Int


def key_blocks(call: AttentionCall, position: Int, rows: int, block: int) -> Blocks:
    """Find the blocks of `block` keys for `rows` query rows from `position` on."""
    last = position + rows - 1
    # Keys that some row sees, and those that all rows see.
    start, full_start, full_stop, stop = _whole(call.kv_len)
    if call.causal:
        stop = _minimum(stop, last + 1)
        full_stop = _minimum(full_stop, position + 1)
    if call.window is not None:
        start = _maximum(start, position - call.window + 1)
        full_start = _maximum(full_start, last - call.window + 1)
    return _in_blocks(start, full_start, full_stop, stop, call.kv_len, block)


def row_blocks(call: AttentionCall, offset: Int, first_key: Int, keys: int, block: int) -> Blocks:
    """Find the blocks of `block` query rows for `keys` keys from `first_key` on.

    `offset` is the position of the first query. A block of keys that reaches past the end of the
    sequence is never wholly seen by this rule's caller: it masks the keys past the end in any case.
    """
    last_key = first_key + keys - 1
    start, full_start, full_stop, stop = _whole(call.q_len)
    if call.causal:
        start = _maximum(start, first_key - offset)
        full_start = _maximum(full_start, last_key - offset)
    if call.window is not None:
        stop = _minimum(stop, last_key + call.window - offset)
        full_stop = _minimum(full_stop, first_key + call.window - offset)
    return _in_blocks(start, full_start, full_stop, stop, call.q_len, block)


def _whole(length: int) -> tuple[Int, Int, Int, Int]:
    return 0, 0, length, length


def _in_blocks(
    start: Int, full_start: Int, full_stop: Int, stop: Int, length: int, block: int
) -> Blocks:
    count = -(-length // block)
    first = _clip(_floor(start, block), 0, count)
    end = _clip(_floor(stop + block - 1, block), first, count)
    end = _where_less(start, stop, end, first)  # nothing is seen: visit no block
    # The last, shorter block is never seen whole: what lies past the end must be hidden.
    whole_first = _clip(_floor(full_start + block - 1, block), first, end)
    whole_end = _clip(_floor(full_stop, block), whole_first, end)
    return Blocks(first, whole_first, whole_end, end)


def _floor(x: Int, block: int) -> Int:
    """Floor division that is right for negative numbers within kernels too."""
    if isinstance(x, int):
        return x // block
    # Within kernels lax.div alone is sure to lower; it rounds towards 0. Whatever is negative is
    # clipped to 0 by the caller: -1 stands for it.
    return jnp.where(x < 0, -1, lax.div(x, jnp.int32(block)))


def _where_less(a: Int, b: Int, then: Int, otherwise: Int) -> Int:
    if isinstance(a, int) and isinstance(b, int):
        return then if a < b else otherwise
    return jnp.where(a < b, then, otherwise)


def _minimum(a: Int, b: Int) -> Int:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _maximum(a: Int, b: Int) -> Int:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _clip(x: Int, low: Int, high: Int) -> Int:
    return _minimum(_maximum(x, low), high)


def segment_blocks(
    q_ids_BT: jax.Array, kv_ids_BS: jax.Array, block_q: int, block_k: int
) -> tuple[jax.Array, jax.Array]:
    """Find for each block of rows the blocks of keys [start, stop) that share a segment with it.

    int32 [batch, blocks of rows] each, start <= stop. A block's ids are taken for the whole
    interval between the smallest and the largest of them: right for any ids, tight where documents
    follow one another in the order of their ids. For blocks of rows that share a segment with a
    block of keys, exchange the arguments.
    """
    q_low, q_high = _id_range(q_ids_BT, block_q)
    k_low, k_high = _id_range(kv_ids_BS, block_k)
    touch_BQK = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    any_BQ = jnp.any(touch_BQK, axis=2)
    start = jnp.argmax(touch_BQK, axis=2)
    stop = touch_BQK.shape[2] - jnp.argmax(touch_BQK[:, :, ::-1], axis=2)
    start, stop = (jnp.where(any_BQ, x, 0).astype(jnp.int32) for x in (start, stop))
    return start, stop


def _id_range(ids_BT: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    padding = -ids_BT.shape[1] % block
    padded = jnp.pad(ids_BT, ((0, 0), (0, padding)), mode="edge")
    blocks = padded.reshape(padded.shape[0], -1, block)
    return blocks.min(axis=2), blocks.max(axis=2)
