"""Dense attention of one chunk of query rows and keys: forward and backward pass.

The softmax runs over the keys of the chunk alone. The backward pass recomputes the weights from the
log-sum-exp (Dao et al., "FlashAttention", 2022, algorithm 4).

Axes: B batch, N heads, K key heads, G query heads that share a key head, C query rows, W keys, H
head_dim, V head_dim of the values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention import dropout
from tjx_kernels.attention.call import AttentionCall, make_mask

type Index = int | jax.Array


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


class ChunkBackwardInputs(NamedTuple):
    """`BackwardInputs` of a chunk: dout [B, K, G, C, V], lse and delta [B, K, G, C]."""

    dout: jax.Array
    lse: jax.Array
    delta: jax.Array


class ChunkGradients(NamedTuple):
    """Gradients of a chunk in the accumulator's dtype; those of k and v are transposed.

    Attributes
    ----------
    q, k, v
        [B, K, G, C, H], [B, K, H, W] and [B, K, V, W].
    bias
        Shape of the chunk's bias, or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None


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


def backward_chunk(call: AttentionCall, chunk: Chunk, rows: ChunkBackwardInputs) -> ChunkGradients:
    """Return the gradients of a chunk, given the LSE and delta of whole rows."""
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
    return ChunkGradients(dq, dk, dv, dbias)


def _product(call: AttentionCall, axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    # Exact float32 products: the defaults are TF32 on GPUs and bfloat16 on TPUs.
    precision = lax.Precision.HIGHEST if call.dtype == "float32" else None
    return jnp.einsum(axes, x, y, precision=precision, preferred_element_type=call.accumulator)


def _scores(call: AttentionCall, chunk: Chunk) -> tuple[jax.Array, jax.Array | None]:
    """Return masked scores [B, K, G, C, W] and the soft cap's derivative, None without a cap."""
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
    mask = make_mask(call, positions, keys, *ids)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    return scores, slope


def _dropout_mask(call: AttentionCall, chunk: Chunk) -> jax.Array | None:
    """Return the dropout mask, bool [B, K, G, C, W]: True keeps a weight; None without dropout."""
    if chunk.seed is None:
        return None
    first, second = (chunk.seed[:, i].reshape(-1, 1, 1, 1, 1) for i in range(2))
    heads = jnp.arange(call.heads).reshape(1, call.kv_heads, call.group, 1, 1)
    rows = chunk.row + jnp.arange(chunk.q.shape[3]).reshape(1, 1, 1, -1, 1)
    keys = jnp.reshape(chunk.key, (-1, 1, 1, 1, 1)) + jnp.arange(chunk.k.shape[2]).reshape(
        1, 1, 1, 1, -1
    )
    # The barrier keeps XLA from recomputing the mask for each use.
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
