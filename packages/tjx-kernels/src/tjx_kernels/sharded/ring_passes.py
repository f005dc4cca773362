"""Attention round a ring of devices, forward and backward.

Keys and values travel while each device keeps its queries; what it finds for each block of keys is
merged with the help of the log-sum-exp (Liu et al., "Ring Attention with Blockwise Transformers
for Near-Infinite Context", 2023). In the backward pass keys and values travel once more, and the
gradients of theirs that are gathered on the way travel with them: a device never holds more than
its own part of the sequence and one arriving.

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
from tjx_kernels.attention.custom_vjp import with_custom_vjp
from tjx_kernels.attention.types import (
    AttentionBackend,
    AttentionCall,
    BackwardInputs,
    Forward,
    Gradients,
    Operands,
)
from tjx_kernels.sharded.ring_schedule import Order, Part, Schedule, schedule

# --- one part -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ring:
    """The devices, and what they compute with."""

    axis_name: str | tuple[str, ...]
    size: int
    order: Order
    implementation: AttentionBackend


class Keys(NamedTuple):
    """What travels."""

    k: jax.Array
    v: jax.Array
    ids: jax.Array | None


def part_call(call: AttentionCall, part: Part) -> AttentionCall:
    """Describe the call that computes a part."""
    return replace(
        call,
        q_len=part.rows[1] - part.rows[0],
        kv_len=part.keys[1] - part.keys[0],
        causal=part.causal,
        window=part.window,
        q_offset=part.offset,
        return_lse=True,
    )


def _part_operands(part: Part, operands: Operands, keys: Keys) -> Operands:
    def cut(x: Any, span: tuple[int, int]) -> Any:
        return None if x is None else lax.slice_in_dim(x, *span, axis=1)

    return Operands(
        q=cut(operands.q, part.rows),
        k=cut(keys.k, part.keys),
        v=cut(keys.v, part.keys),
        q_segment_ids=cut(operands.q_segment_ids, part.rows),
        kv_segment_ids=cut(keys.ids, part.keys),
    )


def _put(x: jax.Array, part: jax.Array, span: tuple[int, int], axis: int) -> jax.Array:
    # Not x.at[...].set: the empty indices of its scatter, handed from one shard_map to another in a
    # loop within a third, make XLA crash (jax 0.11.2).
    whole = part.shape == x.shape
    return part if whole else lax.dynamic_update_slice_in_dim(x, part, span[0], axis)


def _attend_part(
    ring: Ring,
    call: AttentionCall,
    operands: Operands,
    part: Part,
    keys: Keys,
    found: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Merge what a part gives for its rows with what was found before."""
    out, lse = ring.implementation.run(part_call(call, part), _part_operands(part, operands, keys))
    before_out = lax.slice_in_dim(found[0], *part.rows, axis=1)
    before_lse = lax.slice_in_dim(found[1], *part.rows, axis=2)
    total = jnp.logaddexp(before_lse, lse)

    def weighted(x_BTNH: jax.Array, lse_BNT: jax.Array) -> jax.Array:
        # Rows dead so far: exp(-inf - 0) is 0, exp(-inf - -inf) would be NaN.
        weight_BNT = jnp.exp(lse_BNT - jnp.where(total == -jnp.inf, 0, total))
        return weight_BNT.swapaxes(1, 2)[..., None] * x_BTNH

    merged = weighted(before_out, before_lse) + weighted(out.astype(call.accumulator), lse)
    return _put(found[0], merged, part.rows, 1), _put(found[1], total, part.rows, 2)


def _differentiate_part(
    ring: Ring,
    call: AttentionCall,
    operands: Operands,
    rows: BackwardInputs,
    part: Part,
    keys: Keys,
    totals: tuple[jax.Array, tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Add a part's gradients to those of the queries and of the keys that are here."""
    cut = lax.slice_in_dim
    part_rows = BackwardInputs(
        cut(rows.dout, *part.rows, axis=1),
        cut(rows.lse, *part.rows, axis=2),
        cut(rows.delta, *part.rows, axis=2),
    )
    assert ring.implementation.backward is not None
    found = ring.implementation.backward(
        part_call(call, part), _part_operands(part, operands, keys), part_rows
    )

    def add(total: jax.Array, x: jax.Array, span: tuple[int, int]) -> jax.Array:
        return _put(total, cut(total, *span, axis=1) + x.astype(call.accumulator), span, 1)

    dq, (dk, dv) = totals
    return add(dq, found.q, part.rows), (
        add(dk, found.k, part.keys),
        add(dv, found.v, part.keys),
    )


# --- the tour round the ring ----------------------------------------------------------------------

# Given the parts to compute, the keys that are here and the results so far: the new results, and
# what the keys are to take along.
type Visit = Callable[[tuple[Part, ...], Keys, Any], tuple[Any, Any]]


def _send[T](ring: Ring, tree: T, places: int = 1) -> T:
    """Pass arrays on to the device `places` further round the ring."""
    if places % ring.size == 0:
        return tree
    pairs = [(device, (device + places) % ring.size) for device in range(ring.size)]
    move: Any = partial(lax.ppermute, axis_name=ring.axis_name, perm=pairs)
    sent: T = jax.tree.map(move, tree)
    return sent


def _tour(ring: Ring, plan: Schedule, visit: Visit, keys: Keys, results: Any) -> tuple[Any, Any]:
    """Visit all keys; give the results, and, back at home, what the own keys gathered."""
    device = lax.axis_index(ring.axis_name)
    last = len(plan.table) - 1

    def compute(steps: slice, step: Any, keys: Keys, results: Any) -> tuple[Any, Any]:
        # Only what some device does at one of these steps becomes a branch.
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
        # Nothing that is computed at this step waits for what is on its way: they overlap.
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
    def visit(parts: tuple[Part, ...], keys: Keys, found: Any) -> tuple[Any, None]:
        for part in parts:
            found = _attend_part(ring, call, operands, part, keys, found)
        return found, None

    found = jax.tree.map(lambda x: x.astype(call.accumulator), dead_rows(call))
    keys = Keys(operands.k, operands.v, operands.kv_segment_ids)
    (out, lse), _ = _tour(ring, schedule(call, ring.order, ring.size), visit, keys, found)
    return out.astype(call.dtype), lse


def _backward(
    ring: Ring, call: AttentionCall, operands: Operands, rows: BackwardInputs
) -> Gradients:
    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape, call.accumulator)

    def visit(parts: tuple[Part, ...], keys: Keys, dq: Any) -> tuple[Any, Any]:
        totals = dq, (zeros(keys.k), zeros(keys.v))
        for part in parts:
            totals = _differentiate_part(ring, call, operands, rows, part, keys, totals)
        return totals

    keys = Keys(operands.k, operands.v, operands.kv_segment_ids)
    plan = schedule(call, ring.order, ring.size)
    dq, (dk, dv) = _tour(ring, plan, visit, keys, zeros(operands.q))
    dq, dk, dv = (x.astype(call.dtype) for x in (dq, dk, dv))
    return Gradients(dq, dk, dv, None)


@cache
def attention_over(ring: Ring) -> Forward:
    """Give the differentiable function of what one device holds."""
    return with_custom_vjp(partial(_forward, ring), partial(_backward, ring))
