"""Attention in plain JAX for every platform, with memory linear in the sequence length.

Query rows are processed in chunks, so scores exist for one chunk at a time (Rabe and Staats,
"Self-attention does not need O(n^2) memory", 2021). Masked blocks are skipped: consecutive chunks
form a few bands, and a causal band reads only the keys up to its last row; under a causal sliding
window each chunk reads the keys of its window only.

Axes: B batch, N heads, K key heads, G query heads that share a key head, T query rows, S keys, H
head_dim, V head_dim of the values, D either of them. No step splits batch or heads, so both may be
sharded.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention.backend import (
    AttentionBackend,
    BackwardInputs,
    Gradients,
    with_custom_vjp,
)
from tjx_kernels.attention.backends.xla_chunk import (
    Chunk,
    ChunkBackwardInputs,
    Index,
    backward_chunk,
    barrier,
    forward_chunk,
)
from tjx_kernels.attention.call import AttentionCall, Operands

# (carry, first row) -> (carry, results of one chunk, rows at axis 3).
type Step = Callable[[Any, Index], tuple[Any, Any]]


# --- bands ----------------------------------------------------------------------------------------

# Rows of a chunk: enough for matrix products at full speed, few enough that its scores take little
# memory.
CHUNK = 128
# Bands are unrolled; a loop runs over the chunks of a band. More bands skip more of the upper
# triangle (n bands compute (n + 1) / 2n of it) and take longer to compile.
MAX_BANDS = 8


class Band(NamedTuple):
    """Consecutive chunks of query rows of one size that read `width` keys each.

    Attributes
    ----------
    start, chunks, rows
        `chunks` chunks of `rows` rows that begin at row `start`.
    first_key, width
        The keys [first_key, first_key + width) are read.
    slides
        Whether the keys read move with the chunk; then `first_key` is unused.
    """

    start: int
    chunks: int
    rows: int
    first_key: int
    width: int
    slides: bool


def plan_bands(call: AttentionCall) -> list[Band]:
    """Divide the query rows into bands; a shorter last chunk is a band of its own."""
    whole, rest = divmod(call.q_len, CHUNK)
    slides = _slides(call)
    count = 1 if slides or not call.causal or call.q_offset is None else MAX_BANDS
    per_band = max(1, -(-whole // count))
    sizes = [
        (first * CHUNK, min(per_band, whole - first), CHUNK) for first in range(0, whole, per_band)
    ]
    if rest:
        sizes.append((whole * CHUNK, 1, rest))
    return [Band(*size, *_keys_read(call, *size, slides), slides) for size in sizes]


def _slides(call: AttentionCall) -> bool:
    if not call.causal or call.window is None or call.window + CHUNK > call.kv_len:
        return False
    # With one window per batch row, slicing a shared bias would copy it for each row. Its memory is
    # quadratic anyway, so read all keys.
    return call.bias is None or call.q_offset is not None


def _keys_read(
    call: AttentionCall, start: int, chunks: int, rows: int, slides: bool
) -> tuple[int, int]:
    """Return the first key and the number of keys that a band reads."""
    if slides:
        assert call.window is not None
        return 0, call.window + rows - 1
    if call.q_offset is None:
        return 0, call.kv_len
    # Python integers: the range is static. A band of dead rows reads one key, which is masked.
    position = call.q_offset + start
    stop = min(call.kv_len, position + chunks * rows) if call.causal else call.kv_len
    first = 0 if call.window is None else max(0, position - call.window + 1)
    first = min(first, call.kv_len - 1)
    return first, max(stop - first, 1)


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
    """Return the chunk of all rows and all keys, from which `_chunk` slices."""
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


# --- slicing --------------------------------------------------------------------------------------


def _slice(x: jax.Array, first: Index, width: int, axis: int) -> jax.Array:
    """Slice `width` elements of an axis from `first`, a scalar or [B] (one per batch row)."""
    if jnp.ndim(first) == 0:
        return lax.dynamic_slice_in_dim(x, first, width, axis)
    cut = partial(lax.dynamic_slice_in_dim, slice_size=width, axis=axis - 1)
    return jax.vmap(cut)(x, first)


def _update(total: jax.Array, part: jax.Array, first: Index, axis: int) -> jax.Array:
    """Write `part` to the positions of `total` that `_slice` reads."""
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
    """Slice the keys of a band, but not the bias: its copy would be large."""
    return whole if band.slides else _cut_keys(whole, band.first_key, band.width)


def _chunk(call: AttentionCall, band: Band, of_band: Chunk, start: Index) -> Chunk:
    """Slice the chunk of rows that begins at `start` from a band."""
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
    """Scan `step` over the chunks of a band; return the carry and the results of all rows."""
    if band.chunks == 1:
        return step(carry, band.start)
    carry, stacked = lax.scan(step, carry, band.start + band.rows * jnp.arange(band.chunks))
    in_place = (jnp.moveaxis(x, 0, 3) for x in stacked)  # [B, K, G, chunks, C, ...]
    return carry, tuple(x.reshape(*x.shape[:3], -1, *x.shape[5:]) for x in in_place)


def _over_bands(
    call: AttentionCall, whole: Chunk, step: Callable[..., Any], carry: Any
) -> tuple[Any, tuple[jax.Array, ...]]:
    """Run `step(band, chunk of the band, carry, first row)` over all chunks of all bands."""
    results: list[Any] = []
    for band in plan_bands(call):
        if results:
            # Serialize the bands: otherwise XLA may hold the scores of all of them at once.
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
    grouped = ChunkBackwardInputs(_heads_out(call, rows.dout), lse, delta)

    def step(band: Band, of_band: Chunk, carry: Any, start: Index) -> tuple[Any, Any]:
        dk, dv, dbias = carry
        chunk = _chunk(call, band, of_band, start)
        of_rows = ChunkBackwardInputs(*(_slice(x, start, band.rows, 3) for x in grouped))
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


BACKEND = AttentionBackend(run=with_custom_vjp(_forward, _backward), backward=_backward)
