"""Attention masks as ranges of blocks to skip, to mask and to process unmasked.

Query i has position offset + i and key j has position j. `call.make_mask` defines the mask; the
block ranges let a kernel skip fully masked blocks and omit the mask of fully visible ones. All
functions are integer and array arithmetic, valid in XLA programs and in Pallas kernels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention.call import AttentionCall

# Python's int or a traced int32 scalar.
type Int = int | jax.Array


class Blocks(NamedTuple):
    """Range of visible blocks [start, stop) and of fully visible ones [full_start, full_stop).

    start <= full_start <= full_stop <= stop, all within [0, number of blocks]. Segment ids are
    ignored: with segment ids no block may be treated as fully visible.
    """

    start: Int
    full_start: Int
    full_stop: Int
    stop: Int


def key_blocks(call: AttentionCall, position: Int, rows: int, block: int) -> Blocks:
    """Return the blocks of `block` keys that `rows` query rows from `position` on attend to."""
    last = position + rows - 1
    # Keys visible to some row, and keys visible to all rows.
    start, full_start, full_stop, stop = _whole(call.kv_len)
    if call.lookahead is not None:
        stop = _minimum(stop, last + (1 + call.lookahead))
        full_stop = _minimum(full_stop, position + (1 + call.lookahead))
    if call.window is not None:
        start = _maximum(start, position - call.window + 1)
        full_start = _maximum(full_start, last - call.window + 1)
    return _in_blocks(start, full_start, full_stop, stop, call.kv_len, block)


def row_blocks(call: AttentionCall, offset: Int, first_key: Int, keys: int, block: int) -> Blocks:
    """Return the blocks of `block` query rows that attend to `keys` keys from `first_key` on.

    `offset` is the position of the first query. The caller masks keys past the end of the sequence,
    in fully visible blocks too.
    """
    last_key = first_key + keys - 1
    start, full_start, full_stop, stop = _whole(call.q_len)
    if call.lookahead is not None:
        start = _maximum(start, first_key - call.lookahead - offset)
        full_start = _maximum(full_start, last_key - call.lookahead - offset)
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
    end = _where_less(start, stop, end, first)  # everything is masked: no block
    # A shorter last block is never fully visible: indices past the end need a mask.
    whole_first = _clip(_floor(full_start + block - 1, block), first, end)
    whole_end = _clip(_floor(full_stop, block), whole_first, end)
    return Blocks(first, whole_first, whole_end, end)


def _floor(x: Int, block: int) -> Int:
    """Divide and round down, in kernels too."""
    if isinstance(x, int):
        return x // block
    # In kernels only lax.div is sure to lower, and it rounds towards 0. The caller clips negative
    # results to 0, so -1 stands for all of them.
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
    """Return for each block of rows the range of key blocks that share a segment with it.

    A block is represented by the interval from its smallest to its largest id: correct for any ids,
    tight if documents are ordered by id. Swap the arguments for the blocks of rows that share a
    segment with a block of keys.

    Returns
    -------
    start, stop
        int32 [batch, blocks of rows] each, start <= stop.
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
