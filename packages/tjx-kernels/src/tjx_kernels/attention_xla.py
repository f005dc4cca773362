"""Attention in plain JAX for every platform, in memory that is linear in the sequence length.

Query rows are taken in chunks, and scores never exist for more than one chunk (Rabe and Staats,
"Self-attention does not need O(n^2) memory", 2021). What cannot be seen is not computed:
neighbouring chunks form a few bands, and a causal band reads only the keys up to its last row;
under a causal sliding window each chunk reads just the keys of its window.

Axes: B batch, N heads, K key heads, G query heads that share a key head, T query rows, S keys, H
head_dim. Batch and heads stay whole throughout, so that both may be sharded.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tjx_kernels.attention_call import AttentionCall, Implementation
from tjx_kernels.xla_chunk import Keys, Queries, backward_chunk, barrier, forward_chunk

# Rows of a chunk: large enough that the matrix products run at full speed, small enough that the
# scores of a chunk stay a small part of memory.
CHUNK = 128
# Bands are unrolled, chunks within them are looped over. More bands skip more of the upper
# triangle (n bands compute (n + 1) / 2n of it) and take longer to compile.
MAX_BANDS = 8


class Band(NamedTuple):
    """Chunks of query rows, from the row `start` on, that read `width` keys each."""

    start: int
    chunks: int
    rows: int
    first_key: int
    width: int
    slides: bool  # the keys read move with the chunk (first_key then means nothing)


def plan_bands(call: AttentionCall) -> list[Band]:
    """Cut the query rows into bands; the last, shorter chunk is a band of its own."""
    whole, rest = divmod(call.q_len, CHUNK)
    slides = call.causal and call.window is not None and call.window + CHUNK <= call.kv_len
    count = 1 if slides or not call.causal or call.q_offset is None else MAX_BANDS
    per_band = max(1, -(-whole // count))
    sizes = [
        (first * CHUNK, min(per_band, whole - first), CHUNK) for first in range(0, whole, per_band)
    ]
    if rest:
        sizes.append((whole * CHUNK, 1, rest))
    bands = []
    for start, chunks, rows in sizes:
        first_key, stop_key = 0, call.kv_len
        if slides:
            assert call.window is not None
            stop_key = call.window + rows - 1
        elif call.q_offset is not None:
            if call.causal:
                stop_key = call.q_offset + start + chunks * rows
            if call.window is not None:
                first_key = call.q_offset + start - call.window + 1
            # A band of dead rows still reads one key, which the mask then hides.
            stop_key = min(max(stop_key, 1), call.kv_len)
            first_key = min(max(first_key, 0), stop_key - 1)
        bands.append(Band(start, chunks, rows, first_key, stop_key - first_key, slides))
    return bands


# --- all chunks -----------------------------------------------------------------------------------


def _query_chunk(queries: Queries, band: Band, start: jax.Array | int) -> Queries:
    rows = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=band.rows)
    ids = None if queries.ids is None else rows(queries.ids, axis=1)
    return Queries(rows(queries.q, axis=3), ids, queries.first + start)


def _key_slice(keys: Keys, first: jax.Array | int, width: int) -> Keys:
    if width == keys.k.shape[2]:
        return keys
    cut = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=width)
    ids = None if keys.ids is None else cut(keys.ids, axis=1)
    return Keys(cut(keys.k, axis=2), cut(keys.v, axis=2), ids, keys.first + first)


def _key_chunk(call: AttentionCall, band: Band, keys: Keys, first_row: jax.Array | int) -> Keys:
    """Cut from a band's keys those of the chunk whose first row has the position `first_row`."""
    if not band.slides:
        return keys
    assert call.window is not None
    first = jnp.clip(first_row - call.window + 1, 0, call.kv_len - band.width)
    return _key_slice(keys, first, band.width)


type Step = Callable[
    [tuple[jax.Array, ...], jax.Array | int], tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]
]


def _over_chunks(
    band: Band, step: Step, carry: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Run `step(carry, first row)` over a band's chunks; its results have the rows at axis 3."""
    if band.chunks == 1:
        return step(carry, band.start)
    carry, stacked = lax.scan(step, carry, band.start + band.rows * jnp.arange(band.chunks))
    in_place = (jnp.moveaxis(x, 0, 3) for x in stacked)  # [B, K, G, chunks, C, ...]
    return carry, tuple(x.reshape(*x.shape[:3], -1, *x.shape[5:]) for x in in_place)


def _after(
    done: tuple[jax.Array, ...], queries: Queries, keys: Keys
) -> tuple[tuple[jax.Array, ...], Queries, Keys]:
    """Make what follows wait for `done`: else XLA may keep the scores of all bands at once."""
    done, q, k, v = barrier((done, queries.q, keys.k, keys.v))
    return done, queries._replace(q=q), keys._replace(k=k, v=v)


def _band_keys(band: Band, keys: Keys) -> Keys:
    return keys if band.slides else _key_slice(keys, band.first_key, band.width)


def _forward_step(
    call: AttentionCall,
    band: Band,
    queries: Queries,
    keys: Keys,
    carry: tuple[jax.Array, ...],
    start: jax.Array | int,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    chunk = _query_chunk(queries, band, start)
    return carry, forward_chunk(call, chunk, _key_chunk(call, band, keys, chunk.first))


def _forward(call: AttentionCall, queries: Queries, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """Output [B, K, G, T, H] and LSE [B, K, G, T]."""
    results: list[tuple[jax.Array, ...]] = []
    for band in plan_bands(call):
        if results:
            results[-1], queries, keys = _after(results[-1], queries, keys)
        step = partial(_forward_step, call, band, queries, _band_keys(band, keys))
        results.append(_over_chunks(band, step, ())[1])
    out, lse = (jnp.concatenate(parts, axis=3) for parts in zip(*results, strict=True))
    return out, lse


def _backward_step(
    call: AttentionCall,
    band: Band,
    queries: Queries,
    keys: Keys,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    carry: tuple[jax.Array, ...],
    start: jax.Array | int,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    chunk = _query_chunk(queries, band, start)
    chunk_keys = _key_chunk(call, band, keys, chunk.first)
    dout, lse, delta = (lax.dynamic_slice_in_dim(x, start, band.rows, 3) for x in rows)
    dq, dk, dv = backward_chunk(call, chunk, chunk_keys, (dout, lse, delta))
    return tuple(
        _add_at(total, part, chunk_keys.first) for total, part in zip(carry, (dk, dv), strict=True)
    ), (dq,)


def _add_at(total_BKHS: jax.Array, part_BKHW: jax.Array, first: jax.Array | int) -> jax.Array:
    width = part_BKHW.shape[3]
    if width == total_BKHS.shape[3]:
        return total_BKHS + part_BKHW
    part_BKHW += lax.dynamic_slice_in_dim(total_BKHS, first, width, 3)
    return lax.dynamic_update_slice_in_dim(total_BKHS, part_BKHW, first, 3)


def _backward(
    call: AttentionCall,
    queries: Queries,
    keys: Keys,
    rows: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients dq [B, K, G, T, H] and, transposed, dk and dv [B, K, H, S] in float32."""
    totals: tuple[jax.Array, ...] = tuple(
        jnp.zeros((*x.shape[:2], x.shape[3], x.shape[2]), call.accumulator)
        for x in (keys.k, keys.v)
    )
    dqs: list[jax.Array] = []
    for band in plan_bands(call):
        if dqs:
            (*done, dqs[-1]), queries, keys = _after((*totals, dqs[-1]), queries, keys)
            totals = tuple(done)
        step = partial(_backward_step, call, band, queries, _band_keys(band, keys), rows)
        totals, (dq,) = _over_chunks(band, step, totals)
        dqs.append(dq)
    dk, dv = totals
    return jnp.concatenate(dqs, axis=3), dk, dv


# --- the differentiable function ------------------------------------------------------------------


def _heads_out(call: AttentionCall, x_BTNH: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, K, G, T, H]."""
    return x_BTNH.reshape(*x_BTNH.shape[:2], call.kv_heads, -1, call.head_dim).transpose(
        0, 2, 3, 1, 4
    )


def _heads_in(call: AttentionCall, x_BKGTH: jax.Array) -> jax.Array:
    """[B, K, G, T, H] -> [B, T, N, H]."""
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(-1, call.q_len, call.heads, call.head_dim)


def _sides(
    call: AttentionCall,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None,
    kv_ids: jax.Array | None,
    offset: jax.Array | None,
) -> tuple[Queries, Keys]:
    first = call.q_offset if offset is None else offset
    assert first is not None
    keys = Keys(k.swapaxes(1, 2), v.swapaxes(1, 2), kv_ids, 0)
    return Queries(_heads_out(call, q), q_ids, first), keys


type Inputs = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array | None
]


def _primal(
    call: AttentionCall,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None,
    kv_ids: jax.Array | None,
    offset: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    out, lse = _forward(call, *_sides(call, q, k, v, q_ids, kv_ids, offset))
    return _heads_in(call, out), lse.reshape(call.batch, call.heads, call.q_len)


def _primal_forward(
    call: AttentionCall, *inputs: Any
) -> tuple[tuple[jax.Array, jax.Array], tuple[Inputs, jax.Array, jax.Array]]:
    out, lse = _primal(call, *inputs)
    # Both names, so that a remat policy that keeps them need not run the forward pass again.
    # (checkpoint_name has no types in jax.)
    out = checkpoint_name(out, "flash_attention_out")  # type: ignore[no-untyped-call]
    lse = checkpoint_name(lse, "flash_attention_lse")  # type: ignore[no-untyped-call]
    return (out, lse), (inputs, out, lse)


def _primal_backward(
    call: AttentionCall,
    residuals: tuple[Inputs, jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    inputs, out_BTNH, lse_BNT = residuals
    dout_BTNH, dlse_BNT = cotangents
    # A dead row depends on nothing: whatever arrives for it, NaN too, is not passed on.
    dead_BNT = lse_BNT == -jnp.inf
    dead_BTN1 = dead_BNT.swapaxes(1, 2)[..., None]
    dout_BTNH = jnp.where(dead_BTN1, 0, dout_BTNH)
    dlse_BNT = jnp.where(dead_BNT, 0, dlse_BNT)
    lse_BNT = jnp.where(dead_BNT, 0, lse_BNT)  # exp(-inf - 0) = 0, where exp(-inf - -inf) is NaN
    delta_BNT = jnp.einsum(
        "BTNH,BTNH->BNT", out_BTNH, dout_BTNH, preferred_element_type=call.accumulator
    ) - dlse_BNT.astype(call.accumulator)

    per_group = (call.batch, call.kv_heads, -1, call.q_len)
    rows = (_heads_out(call, dout_BTNH), lse_BNT.reshape(per_group), delta_BNT.reshape(per_group))
    dq, dk, dv = _backward(call, *_sides(call, *inputs), rows)
    dk, dv = (x.transpose(0, 3, 1, 2).astype(inputs[1].dtype) for x in (dk, dv))
    return _heads_in(call, dq), dk, dv, None, None, None


_attend = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_attend.defvjp(_primal_forward, _primal_backward)
# Compiled also where the caller is not, or every chunk would be dispatched operation by operation.
_run = jax.jit(_attend, static_argnums=0, inline=True)


def _supports(_call: AttentionCall) -> str | None:
    return None


IMPLEMENTATION = Implementation(run=_run, supports=_supports)
