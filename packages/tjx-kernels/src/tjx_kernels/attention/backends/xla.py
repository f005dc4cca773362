"""Attention in plain JAX for every platform, in memory that is linear in the sequence length.

Query rows are taken in chunks, and scores never exist for more than one chunk (Rabe and Staats,
"Self-attention does not need O(n^2) memory", 2021). What cannot be seen is not computed:
neighbouring chunks form a few bands, and a causal band reads only the keys up to its last row;
under a causal sliding window each chunk reads just the keys of its window.

Axes: B batch, N heads, K key heads, G query heads that share a key head, T query rows, S keys, H
head_dim, V head_dim of the values, D either of them. Batch and heads stay whole throughout, so
that both may be sharded.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention.backends.xla_bands import Band, plan_bands
from tjx_kernels.attention.backends.xla_chunk import (
    Chunk,
    Index,
    Rows,
    backward_chunk,
    barrier,
    forward_chunk,
)
from tjx_kernels.attention.custom_vjp import with_custom_vjp
from tjx_kernels.attention.types import (
    AttentionBackend,
    AttentionCall,
    BackwardInputs,
    Gradients,
    Operands,
)

# Sums over chunks, and results with the rows of one chunk at axis 3: trees of arrays.
type Step = Callable[[Any, Index], tuple[Any, Any]]


# --- layout ---------------------------------------------------------------------------------------


def _heads_out(call: AttentionCall, x_BTND: jax.Array) -> jax.Array:
    """[B, T, N, D] -> [B, K, G, T, D]."""
    grouped = x_BTND.reshape(call.batch, call.q_len, call.kv_heads, call.group, x_BTND.shape[3])
    return grouped.transpose(0, 2, 3, 1, 4)


def _heads_in(call: AttentionCall, x_BKGTD: jax.Array) -> jax.Array:
    """[B, K, G, T, D] -> [B, T, N, D]."""
    return x_BKGTD.transpose(0, 3, 1, 2, 4).reshape(
        call.batch, call.q_len, call.heads, x_BKGTD.shape[4]
    )


def _whole(call: AttentionCall, operands: Operands) -> Chunk:
    """All rows and all keys, to cut chunks from."""
    position = call.q_offset if operands.q_offset is None else operands.q_offset
    assert position is not None
    groups = (call.kv_heads, call.group)
    slopes = operands.alibi_slopes
    return Chunk(
        q=_heads_out(call, operands.q),
        k=operands.k.swapaxes(1, 2),
        v=operands.v.swapaxes(1, 2),
        row=0,
        key=0,
        position=position,
        q_ids=operands.q_segment_ids,
        kv_ids=operands.kv_segment_ids,
        bias=operands.bias,
        slopes=None if slopes is None else slopes.reshape(call.batch, *groups),
        seed=operands.dropout_seed,
    )


# --- cutting --------------------------------------------------------------------------------------


def _slice(x: jax.Array, first: Index, width: int, axis: int) -> jax.Array:
    """Cut `width` elements of an axis, from `first` on: the same for all, or [B], each its own."""
    if jnp.ndim(first) == 0:
        return lax.dynamic_slice_in_dim(x, first, width, axis)
    cut = partial(lax.dynamic_slice_in_dim, slice_size=width, axis=axis - 1)
    return jax.vmap(cut)(x, first)


def _update(total: jax.Array, part: jax.Array, first: Index, axis: int) -> jax.Array:
    """Put `part` where `_slice` would cut it from `total`."""
    put = lax.dynamic_update_slice_in_dim
    if jnp.ndim(first) == 0:
        return put(total, part, first, axis)
    return jax.vmap(partial(put, axis=axis - 1))(total, part, first)


def _add_at(total_BKDS: jax.Array, part_BKDW: jax.Array, first: Index) -> jax.Array:
    width = part_BKDW.shape[3]
    if width == total_BKDS.shape[3]:
        return total_BKDS + part_BKDW
    return _update(total_BKDS, part_BKDW + _slice(total_BKDS, first, width, 3), first, 3)


def _cut_keys(chunk: Chunk, first: Index, width: int) -> Chunk:
    if width == chunk.k.shape[2]:
        return chunk
    k, v = (_slice(x, first, width, 2) for x in (chunk.k, chunk.v))
    ids = None if chunk.kv_ids is None else _slice(chunk.kv_ids, first, width, 1)
    return chunk._replace(k=k, v=v, kv_ids=ids, key=first)


def _band(band: Band, whole: Chunk) -> Chunk:
    """Cut the keys of a band; its bias stays whole, as a copy of it would be large."""
    return whole if band.slides else _cut_keys(whole, band.first_key, band.width)


def _chunk(call: AttentionCall, band: Band, of_band: Chunk, start: Index) -> Chunk:
    """Cut from a band the chunk of rows from `start` on."""
    ids = None if of_band.q_ids is None else _slice(of_band.q_ids, start, band.rows, 1)
    chunk = of_band._replace(
        q=_slice(of_band.q, start, band.rows, 3),
        q_ids=ids,
        row=start,
        position=of_band.position + start,
    )
    if band.slides:
        assert call.window is not None
        first = jnp.clip(chunk.position - call.window + 1, 0, call.kv_len - band.width)
        chunk = _cut_keys(chunk, first, band.width)
    if chunk.bias is None:
        return chunk
    rows_of_bias = _slice(chunk.bias, start, band.rows, 2)
    return chunk._replace(bias=_slice(rows_of_bias, chunk.key, band.width, 3))


# --- all chunks -----------------------------------------------------------------------------------


def _over_chunks(band: Band, step: Step, carry: Any) -> tuple[Any, Any]:
    """Run `step` over a band's chunks: the last carry, and the results of all rows."""
    if band.chunks == 1:
        return step(carry, band.start)
    carry, stacked = lax.scan(step, carry, band.start + band.rows * jnp.arange(band.chunks))
    in_place = (jnp.moveaxis(x, 0, 3) for x in stacked)  # [B, K, G, chunks, C, ...]
    return carry, tuple(x.reshape(*x.shape[:3], -1, *x.shape[5:]) for x in in_place)


def _over_bands(
    call: AttentionCall, whole: Chunk, step: Callable[..., Any], carry: Any
) -> tuple[Any, tuple[jax.Array, ...]]:
    """Run `step(carry, band, its keys, first row)` over all chunks."""
    results: list[Any] = []
    for band in plan_bands(call):
        if results:
            # Wait for the band before: else XLA may keep the scores of all bands at once.
            done = (carry, results[-1], whole.q, whole.k, whole.v)
            carry, results[-1], q, k, v = barrier(done)
            whole = whole._replace(q=q, k=k, v=v)
        bound = partial(step, band, _band(band, whole))
        carry, of_band = _over_chunks(band, bound, carry)
        results.append(of_band)
    return carry, tuple(jnp.concatenate(parts, axis=3) for parts in zip(*results, strict=True))


def _forward(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    def step(band: Band, of_band: Chunk, carry: Any, start: Index) -> tuple[Any, Any]:
        out, lse = forward_chunk(call, _chunk(call, band, of_band, start))
        return carry, (out.astype(call.dtype), lse)

    _, (out, lse) = _over_bands(call, _whole(call, operands), step, ())
    return _heads_in(call, out), lse.reshape(call.batch, call.heads, call.q_len)


def _backward(call: AttentionCall, operands: Operands, rows: BackwardInputs) -> Gradients:
    per_group = (call.batch, call.kv_heads, call.group, call.q_len)
    lse, delta = (x.reshape(per_group) for x in (rows.lse, rows.delta))
    grouped = Rows(_heads_out(call, rows.dout), lse, delta)

    def step(band: Band, of_band: Chunk, carry: Any, start: Index) -> tuple[Any, Any]:
        dk, dv, dbias = carry
        chunk = _chunk(call, band, of_band, start)
        of_rows = Rows(*(_slice(x, start, band.rows, 3) for x in grouped))
        found = backward_chunk(call, chunk, of_rows)
        dk, dv = _add_at(dk, found.k, chunk.key), _add_at(dv, found.v, chunk.key)
        if dbias is not None:
            assert found.bias is not None
            at = (0, 0, start, chunk.key)  # no two chunks share rows: nothing to add to
            dbias = lax.dynamic_update_slice(dbias, found.bias.astype(dbias.dtype), at)
        return (dk, dv, dbias), (found.q.astype(call.dtype),)

    whole = _whole(call, operands)
    dk, dv = (
        jnp.zeros((*x.shape[:2], x.shape[3], x.shape[2]), call.accumulator)
        for x in (whole.k, whole.v)
    )
    dbias = None if whole.bias is None else jnp.zeros_like(whole.bias)
    (dk, dv, dbias), (dq,) = _over_bands(call, whole, step, (dk, dv, dbias))
    dk, dv = (x.transpose(0, 3, 1, 2).astype(call.dtype) for x in (dk, dv))
    return Gradients(_heads_in(call, dq), dk, dv, dbias)


def _supports(call: AttentionCall) -> str | None:
    return "it is not a kernel: leave out interpret" if call.interpret else None


BACKEND = AttentionBackend(
    run=with_custom_vjp(_forward, _backward),
    backward=_backward,
    supports=_supports,
)
