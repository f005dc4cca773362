"""Attention of some query rows against some keys with all their scores in memory, both ways.

The rows see these keys alone, so that their softmax is an ordinary one. The backward pass computes
the weights again from the log-sum-exp (Dao et al., "FlashAttention", 2022, algorithm 4).

Axes: B batch, N heads, K key heads, G query heads that share a key head, C query rows, W keys, H
head_dim, V head_dim of the values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention import dropout
from tjx_kernels.attention.masks import visible
from tjx_kernels.attention.types import AttentionCall

type Index = int | jax.Array


class Chunk(NamedTuple):
    """Query rows, the keys that they are shown, and whatever else their scores depend on.

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
        Dropout's seeds [B, 2], or None.
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


class Rows(NamedTuple):
    """What arrives at the backward pass for query rows, as in `RowGradients`.

    `dout` is [B, K, G, C, V], `lse` and `delta` are [B, K, G, C].
    """

    dout: jax.Array
    lse: jax.Array
    delta: jax.Array


class ChunkGradients(NamedTuple):
    """Gradients in the accumulator's dtype, those of keys and values transposed.

    Attributes
    ----------
    q, k, v
        [B, K, G, C, H], [B, K, H, W] and [B, K, V, W].
    bias
        As the chunk's bias, or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None


def barrier[T](x: T) -> T:
    """Keep XLA from fusing or reordering across this point; the value is unchanged."""
    return lax.optimization_barrier(x)  # type: ignore[no-any-return, no-untyped-call]  # as jax is


def forward_chunk(call: AttentionCall, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """Output [B, K, G, C, V] and LSE [B, K, G, C], both in the accumulator's dtype."""
    scores, _ = _scores(call, chunk)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0.0, top)  # a dead row: its weights are exp(-inf - 0) = 0
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    dead = total == 0
    total = jnp.where(dead, 1.0, total)
    weights = _drop(call, _kept(call, chunk), weights)
    out = _product(call, "BKGCW,BKWV->BKGCV", weights.astype(call.dtype), chunk.v)
    lse = jnp.where(dead, -jnp.inf, top + jnp.log(total))
    return out / total, lse[..., 0]


def backward_chunk(call: AttentionCall, chunk: Chunk, rows: Rows) -> ChunkGradients:
    """Differentiate the scores' exponentials under the LSE and delta of whole rows."""
    scores, slope = _scores(call, chunk)
    weights = barrier(jnp.exp(scores - rows.lse[..., None]))
    kept = _kept(call, chunk)
    dweights = _drop(call, kept, _product(call, "BKGCV,BKWV->BKGCW", rows.dout, chunk.v))
    dscores = weights * (dweights - rows.delta[..., None])
    dbias = None if chunk.bias is None else _bias_gradient(call, chunk.bias.shape, dscores)
    dscores *= call.scale
    if slope is not None:
        dscores *= slope
    # The barriers keep XLA:CPU from computing exp twice, and from transposing the large operand
    # of the last two products (half the speed) instead of their small results.
    dscores = barrier(dscores.astype(call.dtype))
    weights = _drop(call, kept, weights).astype(call.dtype)
    dq = _product(call, "BKGCW,BKWH->BKGCH", dscores, chunk.k)
    dk = _product(call, "BKGCH,BKGCW->BKHW", chunk.q, dscores)
    dv = _product(call, "BKGCV,BKGCW->BKVW", rows.dout, weights)
    dk, dv = barrier((dk, dv))
    return ChunkGradients(dq, dk, dv, dbias)


def _product(call: AttentionCall, axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    # float32 means float32: by default a GPU would take TF32 and a TPU bfloat16.
    precision = lax.Precision.HIGHEST if call.dtype == "float32" else None
    return jnp.einsum(axes, x, y, precision=precision, preferred_element_type=call.accumulator)


def _scores(call: AttentionCall, chunk: Chunk) -> tuple[jax.Array, jax.Array | None]:
    """Masked scores [B, K, G, C, W], and the derivative of the soft cap where there is one."""
    scores = call.scale * _product(call, "BKGCH,BKWH->BKGCW", chunk.q, chunk.k)
    slope = None
    if call.soft_cap is not None:
        capped = jnp.tanh(scores / call.soft_cap)
        scores, slope = call.soft_cap * capped, 1 - capped * capped
    # [B or 1, C, 1] and [B or 1, 1, W]
    positions = jnp.reshape(chunk.position, (-1, 1, 1)) + _count(scores, 3)[None, :, None]
    keys = jnp.reshape(chunk.key, (-1, 1, 1)) + _count(scores, 4)[None, None, :]
    if chunk.slopes is not None:
        distance = jnp.abs(positions - keys)[:, None, None].astype(scores.dtype)
        scores -= chunk.slopes.astype(scores.dtype)[..., None, None] * distance
    if chunk.bias is not None:
        scores += _grouped(call, chunk.bias).astype(scores.dtype)
    ids: list[jax.Array | None] = [None, None]
    if chunk.q_ids is not None and chunk.kv_ids is not None:
        ids = [chunk.q_ids[:, :, None], chunk.kv_ids[:, None, :]]
    seen = visible(call, positions, keys, *ids)
    if seen is not None:
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    return scores, slope


def _kept(call: AttentionCall, chunk: Chunk) -> jax.Array | None:
    """Which weights dropout keeps, bool [B, K, G, C, W]; None without dropout."""
    if chunk.seed is None:
        return None
    first, second = (chunk.seed[:, i].reshape(-1, 1, 1, 1, 1) for i in range(2))
    heads = jnp.arange(call.heads).reshape(1, call.kv_heads, call.group, 1, 1)
    rows = chunk.row + jnp.arange(chunk.q.shape[3]).reshape(1, 1, 1, -1, 1)
    keys = jnp.reshape(chunk.key, (-1, 1, 1, 1, 1)) + jnp.arange(chunk.k.shape[2]).reshape(
        1, 1, 1, 1, -1
    )
    # Once, not in every use of it.
    kept: jax.Array = barrier(dropout.keep((first, second), heads, rows, keys, call.dropout_rate))
    return kept


def _drop(call: AttentionCall, kept: jax.Array | None, weights: jax.Array) -> jax.Array:
    return weights if kept is None else jnp.where(kept, weights / (1 - call.dropout_rate), 0)


def _count(x: jax.Array, axis: int) -> jax.Array:
    return jnp.arange(x.shape[axis])


def _grouped(call: AttentionCall, bias: jax.Array) -> jax.Array:
    """[B or 1, N or 1, C, W] -> [B or 1, K or 1, G or 1, C, W]."""
    groups = (1, 1) if bias.shape[1] == 1 else (call.kv_heads, call.group)
    return bias.reshape(bias.shape[0], *groups, *bias.shape[2:])


def _bias_gradient(call: AttentionCall, shape: tuple[int, ...], dscores: jax.Array) -> jax.Array:
    """Sum [B, K, G, C, W] over the axes along which a bias of this shape was broadcast."""
    dbias = dscores.reshape(call.batch, call.heads, *shape[2:])
    shared = [axis for axis in (0, 1) if shape[axis] < dbias.shape[axis]]
    return jnp.sum(dbias, shared, keepdims=True)
