"""Attention masks as ranges of blocks to skip, to mask and to process unmasked.

Query i has position offset + i and key j has position j. `call.make_mask` defines the mask; the
block ranges let a kernel skip fully masked blocks and omit the mask of fully visible ones. They are
integer arithmetic, valid in XLA programs and in Pallas kernels. Under a mask function the visible
blocks are no range: `block_lists` lists them in an XLA program before the kernel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention.call import AttentionCall, Operands, make_mask
from tjx_kernels.attention.mask_functions import mask_sizes

_PAIRS = 2**24  # of which `block_lists` evaluates a mask function at a time
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


class BlockLists(NamedTuple):
    """Blocks that each block of rows, or of keys, shares visible pairs with.

    The batch axis has size 1 if all batch rows have the same mask, as has that of the heads.

    Attributes
    ----------
    order
        int32 [batch or 1, heads or 1, blocks, other blocks]: fully visible other blocks first,
        then partly visible ones, then masked ones.
    full, stop
        int32 [batch or 1, heads or 1, blocks]: ends of the first two groups.
    """

    order: jax.Array
    full: jax.Array
    stop: jax.Array


def list_sizes(call: AttentionCall) -> tuple[int, int]:
    """Return the sizes of the lists of `block_lists` along batch and heads."""
    assert call.mask is not None
    batch, heads = mask_sizes(call.mask, call.batch, call.heads)
    return call.batch if call.segment_ids or call.q_offset is None else batch, heads


def block_lists(
    call: AttentionCall, operands: Operands, block_q: int, block_k: int, *, of_keys: bool = False
) -> BlockLists:
    """List the blocks visible under all masks of a call with a mask function.

    Parameters
    ----------
    call, operands
        The call; segment ids and offsets are read.
    block_q, block_k
        Rows and keys of a block.
    of_keys
        Whether to list the blocks of rows for each block of keys, instead of the converse.
    """
    rows, keys = -(-call.q_len // block_q), -(-call.kv_len // block_k)
    # Axes: batch, heads, rows of a block, blocks of keys, keys of a block.
    batch = jnp.arange(call.batch).reshape(-1, 1, 1, 1, 1)
    head = jnp.arange(call.heads).reshape(1, -1, 1, 1, 1)
    key = jnp.arange(keys * block_k).reshape(1, 1, 1, keys, block_k)
    first = jnp.asarray(call.q_offset if operands.q_offset is None else operands.q_offset)

    def visible_pairs(block: jax.Array) -> jax.Array:
        row = block * block_q + jnp.arange(block_q).reshape(1, 1, -1, 1, 1)
        mask = make_mask(call, first.reshape(-1, 1, 1, 1, 1) + row, key, batch=batch, head=head)
        assert mask is not None
        # Pairs past the ends are masked: blocks with them are never fully visible.
        return jnp.sum(mask & (row < call.q_len) & (key < call.kv_len), axis=(2, 4))

    # A few blocks of rows at a time, as XLA may store parts of the mask.
    at_once = max(1, _PAIRS // (block_q * call.kv_len))
    visible = lax.map(visible_pairs, jnp.arange(rows), batch_size=at_once)
    visible = jnp.moveaxis(visible, 0, 2)  # [batch or 1, heads or 1, blocks of rows, of keys]
    partly = visible > 0
    full = visible == block_q * block_k
    if operands.q_segment_ids is not None and operands.kv_segment_ids is not None:
        touch = _touch(operands.q_segment_ids, operands.kv_segment_ids, block_q, block_k)
        partly, full = partly & touch[:, None], jnp.zeros_like(full)  # ids mask every block
    group = jnp.where(full, 0, jnp.where(partly, 1, 2))
    group = group.swapaxes(2, 3) if of_keys else group
    order = jnp.argsort(group, axis=3, stable=True).astype(jnp.int32)
    ends = (jnp.sum(group <= last, axis=3, dtype=jnp.int32) for last in (0, 1))
    return BlockLists(order, *ends)


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
    touch_BQK = _touch(q_ids_BT, kv_ids_BS, block_q, block_k)
    any_BQ = jnp.any(touch_BQK, axis=2)
    start = jnp.argmax(touch_BQK, axis=2)
    stop = touch_BQK.shape[2] - jnp.argmax(touch_BQK[:, :, ::-1], axis=2)
    start, stop = (jnp.where(any_BQ, x, 0).astype(jnp.int32) for x in (start, stop))
    return start, stop


def _touch(q_ids_BT: jax.Array, kv_ids_BS: jax.Array, block_q: int, block_k: int) -> jax.Array:
    """Return whether blocks of rows and of keys may share a segment, [batch, rows, keys]."""
    q_low, q_high = _id_range(q_ids_BT, block_q)
    k_low, k_high = _id_range(kv_ids_BS, block_k)
    return (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])


def _id_range(ids_BT: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    padding = -ids_BT.shape[1] % block
    padded = jnp.pad(ids_BT, ((0, 0), (0, padding)), mode="edge")
    blocks = padded.reshape(padded.shape[0], -1, block)
    return blocks.min(axis=2), blocks.max(axis=2)
