"""Attention in plain JAX for every platform, with memory linear in the sequence length.

Query rows are processed in chunks, so scores exist for one chunk at a time (Rabe and Staats,
"Self-attention does not need O(n^2) memory", 2021). Masked blocks are skipped: consecutive chunks
form a few bands, and a causal band reads only the keys up to its last row; under a causal or
symmetric sliding window each chunk reads the keys of its window only. The backward pass recomputes
the weights from the log-sum-exp (Dao et al., "FlashAttention", 2022, algorithm 4).

Axes: B batch, N heads, K key heads, G query heads that share a key head, T query rows, C rows of a
chunk, S keys, W keys of a chunk, H head_dim, V head_dim of the values, D either of them. No step
splits batch or heads, so both may be sharded.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention import dropout
from tjx_kernels.attention.backend import (
    AttentionBackend,
    BackwardInputs,
    Gradients,
    with_custom_vjp,
)
from tjx_kernels.attention.call import AttentionCall, Operands, make_mask
from tjx_kernels.target import current_target

type Index = int | jax.Array
# (carry, first row) -> (carry, results of one chunk, rows at axis 3).
type Step = Callable[[Any, Index], tuple[Any, Any]]


# --- one chunk ------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Query rows, keys and values of a chunk, with the inputs of their mask, bias and dropout.

    Attributes
    ----------
    q, k, v
        [B, K, G, C, H], [B, K, W, H] and [B, K, W, V].
    row, key
        Index of the first query row, a scalar, and of the first key, a scalar or [B].
    position
        Position of the first query row: a scalar or [B].
    q_ids, kv_ids
        Segment ids [B, C] and [B, W], or None.
    bias
        [B or 1, N or 1, C, W], or None.
    slopes
        ALiBi slopes [B, K, G], or None.
    seed
        Dropout seeds [B, 2], or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    row: Index
    key: Index
    position: Index
    q_ids: jax.Array | None = None
    kv_ids: jax.Array | None = None
    bias: jax.Array | None = None
    slopes: jax.Array | None = None
    seed: jax.Array | None = None


def barrier[T](x: T) -> T:
    """Return x unchanged; XLA neither fuses nor reorders operations across this point."""
    return lax.optimization_barrier(x)  # type: ignore[no-any-return, no-untyped-call]  # as jax is


def forward_chunk(call: AttentionCall, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """Return output [B, K, G, C, V] and LSE [B, K, G, C] in the accumulator's dtype."""
    scores, _ = _scores(call, chunk)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0.0, top)  # dead rows: the weights are exp(-inf - 0) = 0
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    dead = total == 0
    total = jnp.where(dead, 1.0, total)
    weights = _drop(call, _dropout_mask(call, chunk), weights)
    out = _product(call, "BKGCW,BKWV->BKGCV", weights.astype(call.dtype), chunk.v)
    lse = jnp.where(dead, -jnp.inf, top + jnp.log(total))
    return out / total, lse[..., 0]


def backward_chunk(call: AttentionCall, chunk: Chunk, rows: BackwardInputs) -> Gradients:
    """Return the gradients of a chunk in the accumulator's dtype.

    `rows` holds dout [B, K, G, C, V], and the LSE and delta of whole rows, [B, K, G, C]. The
    gradients of k and v are transposed, [B, K, H, W] and [B, K, V, W].
    """
    scores, slope = _scores(call, chunk)
    weights = barrier(jnp.exp(scores - rows.lse[..., None]))
    kept = _dropout_mask(call, chunk)
    dweights = _drop(call, kept, _product(call, "BKGCV,BKWV->BKGCW", rows.dout, chunk.v))
    dscores = weights * (dweights - rows.delta[..., None])
    dbias = None if chunk.bias is None else _bias_gradient(call, chunk.bias.shape, dscores)
    dscores *= call.scale
    if slope is not None:
        dscores *= slope
    # The barriers keep XLA:CPU from computing exp twice and from transposing the large operand of
    # the last two products (half the speed) instead of their small results.
    dscores = barrier(dscores.astype(call.dtype))
    weights = _drop(call, kept, weights).astype(call.dtype)
    dq = _product(call, "BKGCW,BKWH->BKGCH", dscores, chunk.k)
    dk = _product(call, "BKGCH,BKGCW->BKHW", chunk.q, dscores)
    dv = _product(call, "BKGCV,BKGCW->BKVW", rows.dout, weights)
    dk, dv = barrier((dk, dv))
    return Gradients(dq, dk, dv, dbias)


def _product(call: AttentionCall, axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    # Exact float32 products: the defaults are TF32 on GPUs and bfloat16 on TPUs.
    precision = lax.Precision.HIGHEST if call.dtype == "float32" else None
    return jnp.einsum(axes, x, y, precision=precision, preferred_element_type=call.accumulator)


def _scores(call: AttentionCall, chunk: Chunk) -> tuple[jax.Array, jax.Array | None]:
    """Return masked scores [B, K, G, C, W] and the soft cap's derivative, None without a cap."""
    scores, slope = call.scale * _product(call, "BKGCH,BKWH->BKGCW", chunk.q, chunk.k), None
    if call.soft_cap is not None:
        capped = jnp.tanh(scores / call.soft_cap)
        scores, slope = call.soft_cap * capped, 1 - capped * capped
    head, row, key = _indices(call, chunk)
    position = _column(chunk.position) + row
    if chunk.slopes is not None:
        distance = jnp.abs(position - key).astype(scores.dtype)
        scores -= chunk.slopes.astype(scores.dtype)[..., None, None] * distance
    if chunk.bias is not None:
        scores += _grouped(call, chunk.bias).astype(scores.dtype)
    q_ids, kv_ids = chunk.q_ids, chunk.kv_ids
    if q_ids is not None and kv_ids is not None:
        q_ids, kv_ids = q_ids[:, None, None, :, None], kv_ids[:, None, None, None, :]
    batch = _column(jnp.arange(call.batch))
    mask = make_mask(call, position, key, q_ids, kv_ids, batch=batch, head=head)
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf), slope


def _column(x: Index) -> jax.Array:
    return jnp.reshape(x, (-1, 1, 1, 1, 1))


def _indices(call: AttentionCall, chunk: Chunk) -> tuple[jax.Array, ...]:
    """Return heads, rows and keys as indices that broadcast against [B, K, G, C, W]."""
    heads = jnp.arange(call.heads).reshape(1, call.kv_heads, call.group, 1, 1)
    rows = jnp.arange(chunk.q.shape[3]).reshape(1, 1, 1, -1, 1)
    return heads, rows, _column(chunk.key) + jnp.arange(chunk.k.shape[2]).reshape(1, 1, 1, 1, -1)


def _dropout_mask(call: AttentionCall, chunk: Chunk) -> jax.Array | None:
    """Return the dropout mask, bool [B, K, G, C, W]: True keeps a weight; None without dropout."""
    if chunk.seed is None:
        return None
    seed = _column(chunk.seed[:, 0]), _column(chunk.seed[:, 1])
    head, row, key = _indices(call, chunk)
    kept: jax.Array = dropout.keep(seed, head, chunk.row + row, key, call.dropout_rate)
    return barrier(kept)  # so that XLA does not compute it for each use


def _drop(call: AttentionCall, kept: jax.Array | None, weights: jax.Array) -> jax.Array:
    return weights if kept is None else jnp.where(kept, weights / (1 - call.dropout_rate), 0)


def _grouped(call: AttentionCall, bias: jax.Array) -> jax.Array:
    """[B or 1, N or 1, C, W] -> [B or 1, K or 1, G or 1, C, W]."""
    groups = (1, 1) if bias.shape[1] == 1 else (call.kv_heads, call.group)
    return bias.reshape(bias.shape[0], *groups, *bias.shape[2:])


def _bias_gradient(call: AttentionCall, shape: tuple[int, ...], dscores: jax.Array) -> jax.Array:
    """Sum [B, K, G, C, W] over the axes along which a bias of this shape was broadcast."""
    dbias = dscores.reshape(call.batch, call.heads, *shape[2:])
    shared = [axis for axis in (0, 1) if shape[axis] < dbias.shape[axis]]
    return jnp.sum(dbias, shared, keepdims=True)


# --- bands ----------------------------------------------------------------------------------------

# Rows of a chunk: enough for fast matrix products, few enough that its scores take little memory.
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
    window, ahead = call.window, call.lookahead
    if window is None or ahead is None or window + ahead + CHUNK > call.kv_len:
        return False
    # With one window per batch row, slicing a shared bias would copy it for each row. Its memory is
    # quadratic anyway, so read all keys.
    return call.bias is None or call.q_offset is not None


def _keys_read(
    call: AttentionCall, start: int, chunks: int, rows: int, slides: bool
) -> tuple[int, int]:
    """Return the first key and the number of keys that a band reads."""
    if slides:  # then neither the window nor the lookahead is unlimited
        return 0, (call.window or 0) + (call.lookahead or 0) + rows - 1
    if call.q_offset is None:
        return 0, call.kv_len
    # Python integers: the range is static. A band of dead rows reads one key, which is masked.
    position = call.q_offset + start
    end = position + chunks * rows
    stop = call.kv_len if call.lookahead is None else min(call.kv_len, end + call.lookahead)
    first = 0 if call.window is None else max(0, position - call.window + 1)
    first = min(first, call.kv_len - 1)
    return first, max(stop - first, 1)


def _heads_out(call: AttentionCall, x_BTND: jax.Array) -> jax.Array:
    """[B, T, N, D] -> [B, K, G, T, D]."""
    grouped = x_BTND.reshape(call.batch, call.q_len, call.kv_heads, call.group, x_BTND.shape[3])
    return grouped.transpose(0, 2, 3, 1, 4)


def _heads_in(call: AttentionCall, x_BKGTD: jax.Array) -> jax.Array:
    """[B, K, G, T, D] -> [B, T, N, D]."""
    return x_BKGTD.transpose(0, 3, 1, 2, 4).reshape(call.batch, call.q_len, call.heads, -1)


def _whole(call: AttentionCall, operands: Operands) -> Chunk:
    """Return the chunk of all rows and all keys, from which `_chunk` slices."""
    position = call.q_offset if operands.q_offset is None else operands.q_offset
    assert position is not None
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
        slopes=None if slopes is None else slopes.reshape(call.batch, call.kv_heads, -1),
        seed=operands.dropout_seed,
    )


def _slice(x: jax.Array, first: Index, width: int, axis: int) -> jax.Array:
    """Slice `width` elements of an axis from `first`, a scalar or [B] (one per batch row)."""
    if jnp.ndim(first) == 0:
        return lax.dynamic_slice_in_dim(x, first, width, axis)
    cut = partial(lax.dynamic_slice_in_dim, slice_size=width, axis=axis - 1)
    return jax.vmap(cut)(x, first)


def _add_at(total_BKDS: jax.Array, part_BKDW: jax.Array, first: Index) -> jax.Array:
    width = part_BKDW.shape[3]
    if width == total_BKDS.shape[3]:
        return total_BKDS + part_BKDW
    part_BKDW += _slice(total_BKDS, first, width, 3)
    if jnp.ndim(first) == 0:
        return lax.dynamic_update_slice_in_dim(total_BKDS, part_BKDW, first, 3)
    put = partial(lax.dynamic_update_slice_in_dim, axis=2)
    return jax.vmap(put)(total_BKDS, part_BKDW, first)


def _cut_keys(chunk: Chunk, first: Index, width: int) -> Chunk:
    if width == chunk.k.shape[2]:
        return chunk
    k, v = (_slice(x, first, width, 2) for x in (chunk.k, chunk.v))
    ids = None if chunk.kv_ids is None else _slice(chunk.kv_ids, first, width, 1)
    return chunk._replace(k=k, v=v, kv_ids=ids, key=first)


def _chunk(call: AttentionCall, band: Band, of_band: Chunk, start: Index) -> Chunk:
    """Slice the chunk of rows that begins at `start` from a band."""
    ids = None if of_band.q_ids is None else _slice(of_band.q_ids, start, band.rows, 1)
    q = _slice(of_band.q, start, band.rows, 3)
    chunk = of_band._replace(q=q, q_ids=ids, row=start, position=of_band.position + start)
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
        # Slice the keys of the band, but not the bias: its copy would be large.
        of_band = whole if band.slides else _cut_keys(whole, band.first_key, band.width)
        bound = partial(step, band, of_band)
        carry, found = _over_chunks(band, bound, carry)
        results.append(found)
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
    grouped = BackwardInputs(_heads_out(call, rows.dout), lse, delta)

    def step(band: Band, of_band: Chunk, carry: Any, start: Index) -> tuple[Any, Any]:
        dk, dv, dbias = carry
        chunk = _chunk(call, band, of_band, start)
        of_rows = BackwardInputs(*(_slice(x, start, band.rows, 3) for x in grouped))
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
    dq = _heads_in(call, dq)
    if current_target().platform == "cpu":  # without barriers XLA transposes them once per use
        dq, dk, dv = barrier(dq), barrier(dk), barrier(dv)
    return Gradients(dq, dk, dv, dbias)


BACKEND = AttentionBackend(run=with_custom_vjp(_forward, _backward), backward=_backward, masks=True)
