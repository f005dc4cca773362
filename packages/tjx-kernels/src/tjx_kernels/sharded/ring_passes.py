"""Forward and backward pass of ring attention.

Keys and values rotate around the ring while each device keeps its queries; partial results are
merged by their log-sum-exp (Liu et al., "Ring Attention with Blockwise Transformers for
Near-Infinite Context", 2023). In the backward pass keys and values rotate again together with their
accumulated gradients. A device holds at most its own shard and one received shard.

Axes: B batch, T queries and S keys of one device, N heads, H head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tjx_kernels.attention.api import dead_rows
from tjx_kernels.attention.backend import (
    AttentionBackend,
    BackwardInputs,
    Forward,
    Gradients,
    with_custom_vjp,
)
from tjx_kernels.attention.call import AttentionCall, Operands
from tjx_kernels.sharded.ring_schedule import Order, RingBlock, RingSchedule, schedule

# --- one block ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ring:
    """Mesh axis, number of devices, token order and backend of a ring."""

    axis_name: str | tuple[str, ...]
    size: int
    order: Order
    backend: AttentionBackend


class Keys(NamedTuple):
    """Rotating arrays: keys, values and their segment ids."""

    k: jax.Array
    v: jax.Array
    ids: jax.Array | None


def block_call(call: AttentionCall, block: RingBlock) -> AttentionCall:
    """Return the attention call of a block."""
    return replace(
        call,
        q_len=block.rows[1] - block.rows[0],
        kv_len=block.keys[1] - block.keys[0],
        causal=block.causal,
        window=block.window,
        symmetric_window=call.symmetric_window and block.window is not None,
        q_offset=block.offset,
        return_lse=True,
    )


def _block_operands(block: RingBlock, operands: Operands, keys: Keys) -> Operands:
    def cut(x: Any, span: tuple[int, int]) -> Any:
        return None if x is None else lax.slice_in_dim(x, *span, axis=1)

    return Operands(
        q=cut(operands.q, block.rows),
        k=cut(keys.k, block.keys),
        v=cut(keys.v, block.keys),
        q_segment_ids=cut(operands.q_segment_ids, block.rows),
        kv_segment_ids=cut(keys.ids, block.keys),
    )


def _put(x: jax.Array, block: jax.Array, span: tuple[int, int], axis: int) -> jax.Array:
    # Not x.at[...].set: the empty indices of its scatter, handed from one shard_map to another in a
    # loop within a third, make XLA crash (jax 0.11.2).
    whole = block.shape == x.shape
    return block if whole else lax.dynamic_update_slice_in_dim(x, block, span[0], axis)


def _attend_block(
    ring: Ring,
    call: AttentionCall,
    operands: Operands,
    block: RingBlock,
    keys: Keys,
    found: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Compute a block and merge its result into the output and LSE so far."""
    out, lse = ring.backend.run(block_call(call, block), _block_operands(block, operands, keys))
    before_out = lax.slice_in_dim(found[0], *block.rows, axis=1)
    before_lse = lax.slice_in_dim(found[1], *block.rows, axis=2)
    total = jnp.logaddexp(before_lse, lse)

    def weighted(x_BTNH: jax.Array, lse_BNT: jax.Array) -> jax.Array:
        # Rows without a key so far: exp(-inf - 0) is 0, exp(-inf - -inf) would be NaN.
        weight_BNT = jnp.exp(lse_BNT - jnp.where(total == -jnp.inf, 0, total))
        return weight_BNT.swapaxes(1, 2)[..., None] * x_BTNH

    merged = weighted(before_out, before_lse) + weighted(out.astype(call.accumulator), lse)
    return _put(found[0], merged, block.rows, 1), _put(found[1], total, block.rows, 2)


def _differentiate_block(
    ring: Ring,
    call: AttentionCall,
    operands: Operands,
    rows: BackwardInputs,
    block: RingBlock,
    keys: Keys,
    totals: tuple[jax.Array, tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Add the gradients of a block to dq and to the dk and dv of the current keys."""
    cut = lax.slice_in_dim
    block_rows = BackwardInputs(
        cut(rows.dout, *block.rows, axis=1),
        cut(rows.lse, *block.rows, axis=2),
        cut(rows.delta, *block.rows, axis=2),
    )
    assert ring.backend.backward is not None
    found = ring.backend.backward(
        block_call(call, block), _block_operands(block, operands, keys), block_rows
    )

    def add(total: jax.Array, x: jax.Array, span: tuple[int, int]) -> jax.Array:
        return _put(total, cut(total, *span, axis=1) + x.astype(call.accumulator), span, 1)

    dq, (dk, dv) = totals
    return add(dq, found.q, block.rows), (
        add(dk, found.k, block.keys),
        add(dv, found.v, block.keys),
    )


# --- rotation -------------------------------------------------------------------------------------

# (blocks, current keys, results so far) -> (results, values that rotate with the keys).
type Visit = Callable[[tuple[RingBlock, ...], Keys, Any], tuple[Any, Any]]


def _send[T](ring: Ring, tree: T, places: int = 1) -> T:
    """Send arrays to the device `places` steps ahead in the ring."""
    if places % ring.size == 0:
        return tree
    pairs = [(device, (device + places) % ring.size) for device in range(ring.size)]
    move: Any = partial(lax.ppermute, axis_name=ring.axis_name, perm=pairs)
    sent: T = jax.tree.map(move, tree)
    return sent


def _rotate(
    ring: Ring, plan: RingSchedule, visit: Visit, keys: Keys, results: Any
) -> tuple[Any, Any]:
    """Run `visit` on every shard of keys; return results and values accumulated by the own keys."""
    device = lax.axis_index(ring.axis_name)
    last = len(plan.table) - 1

    def compute(steps: slice, step: Any, keys: Keys, results: Any) -> tuple[Any, Any]:
        # Only cases that occur at these steps become branches.
        table = plan.table[steps]
        cases = sorted(set(table.flat))
        branches = [partial(visit, plan.cases[case]) for case in cases]
        if len(branches) == 1:
            return branches[0](keys, results)
        which = jnp.asarray(np.searchsorted(cases, table))[step, device]
        found: tuple[Any, Any] = lax.switch(which, branches, keys, results)
        return found

    def middle(carry: Any, step: jax.Array) -> tuple[Any, None]:
        keys, results, gathered = carry
        # This step's computation does not depend on the transfer, so they overlap.
        coming, gathered = _send(ring, (keys, gathered))
        results, gained = compute(slice(1, last), step - 1, keys, results)
        return (coming, results, jax.tree.map(jnp.add, gathered, gained)), None

    coming = _send(ring, keys) if last else keys
    results, gathered = compute(slice(0, 1), 0, keys, results)
    if last > 1:
        (coming, results, gathered), _ = lax.scan(
            middle, (coming, results, gathered), jnp.arange(1, last)
        )
    if last:
        gathered = _send(ring, gathered)
        results, gained = compute(slice(last, last + 1), 0, coming, results)
        gathered = jax.tree.map(jnp.add, gathered, gained)
    return results, _send(ring, gathered, -last)


def _forward(ring: Ring, call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    def visit(blocks: tuple[RingBlock, ...], keys: Keys, found: Any) -> tuple[Any, None]:
        for block in blocks:
            found = _attend_block(ring, call, operands, block, keys, found)
        return found, None

    found = jax.tree.map(lambda x: x.astype(call.accumulator), dead_rows(call))
    keys = Keys(operands.k, operands.v, operands.kv_segment_ids)
    (out, lse), _ = _rotate(ring, schedule(call, ring.order, ring.size), visit, keys, found)
    return out.astype(call.dtype), lse


def _backward(
    ring: Ring, call: AttentionCall, operands: Operands, rows: BackwardInputs
) -> Gradients:
    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape, call.accumulator)

    def visit(blocks: tuple[RingBlock, ...], keys: Keys, dq: Any) -> tuple[Any, Any]:
        totals = dq, (zeros(keys.k), zeros(keys.v))
        for block in blocks:
            totals = _differentiate_block(ring, call, operands, rows, block, keys, totals)
        return totals

    keys = Keys(operands.k, operands.v, operands.kv_segment_ids)
    plan = schedule(call, ring.order, ring.size)
    dq, (dk, dv) = _rotate(ring, plan, visit, keys, zeros(operands.q))
    dq, dk, dv = (x.astype(call.dtype) for x in (dq, dk, dv))
    return Gradients(dq, dk, dv, None)


@cache
def attention_over(ring: Ring) -> Forward:
    """Return the differentiable attention function of one device's shard."""
    return with_custom_vjp(partial(_forward, ring), partial(_backward, ring))
