"""Attention of one chunk of query rows against the keys it reads, forward and backward.

The chunk sees all its keys at once, so its softmax is an ordinary one. The backward pass computes
the weights again from the log-sum-exp (Dao et al., "FlashAttention", 2022, algorithm 4).

Axes: B batch, K key heads, G query heads that share a key head, C rows of the chunk, W keys that
it reads, H head_dim.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention_call import AttentionCall


class Keys(NamedTuple):
    """What a band, or one chunk of it, reads of the key side."""

    k: jax.Array  # [B, K, W, H]
    v: jax.Array  # [B, K, W, H]
    ids: jax.Array | None  # [B, W]
    first: jax.Array | int  # position of the first of them


class Queries(NamedTuple):
    """The query side of all rows, or of one chunk."""

    q: jax.Array  # [B, K, G, C, H]
    ids: jax.Array | None  # [B, C]
    first: jax.Array | int  # position of the first of them


def barrier[T](x: T) -> T:
    """Keep XLA from fusing or reordering across this point; the value is unchanged."""
    return lax.optimization_barrier(x)  # type: ignore[no-any-return, no-untyped-call]  # as jax is


def _visible(call: AttentionCall, queries: Queries, keys: Keys) -> jax.Array | None:
    """Which key each row sees, bool [B or 1, 1, 1, C, W]; None where all see all."""
    i_C1 = queries.first + jnp.arange(queries.q.shape[3])[:, None]
    j_1W = keys.first + jnp.arange(keys.k.shape[2])[None, :]
    masks = []
    if call.causal:
        masks.append((j_1W <= i_C1)[None])
    if call.window is not None:
        masks.append((j_1W > i_C1 - call.window)[None])
    if queries.ids is not None and keys.ids is not None:
        masks.append(queries.ids[:, :, None] == keys.ids[:, None, :])
    return reduce(jnp.logical_and, masks)[:, None, None] if masks else None


def _scores(
    call: AttentionCall, queries: Queries, keys: Keys
) -> tuple[jax.Array, jax.Array | None]:
    """Masked scores [B, K, G, C, W], and the derivative of the soft cap where there is one."""
    scores = call.scale * jnp.einsum(
        "BKGCH,BKWH->BKGCW",
        queries.q,
        keys.k,
        preferred_element_type=call.accumulator,
    )
    slope = None
    if call.soft_cap is not None:
        capped = jnp.tanh(scores / call.soft_cap)
        scores, slope = call.soft_cap * capped, 1 - capped * capped
    visible = _visible(call, queries, keys)
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    return scores, slope


def forward_chunk(call: AttentionCall, queries: Queries, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """Output [B, K, G, C, H] and LSE [B, K, G, C]."""
    q, v = queries.q, keys.v
    scores, _ = _scores(call, queries, keys)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top)  # a dead row: its weights are exp(-inf - 0) = 0
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    dead = total == 0
    total = jnp.where(dead, 1, total)
    out = jnp.einsum(
        "BKGCW,BKWH->BKGCH", weights.astype(v.dtype), v, preferred_element_type=call.accumulator
    )
    lse = jnp.where(dead, -jnp.inf, top + jnp.log(total))
    return (out / total).astype(q.dtype), lse[..., 0]


def backward_chunk(
    call: AttentionCall, queries: Queries, keys: Keys, rows: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients dq [B, K, G, C, H] and, transposed, dk and dv [B, K, H, W].

    `rows` holds, for the rows of the chunk, the output's cotangent [B, K, G, C, H], the LSE and
    delta = rowsum(out * dout) - dlse [B, K, G, C].
    """
    q = queries.q
    dout, lse_BKGC, delta_BKGC = rows
    product = partial(jnp.einsum, preferred_element_type=call.accumulator)
    scores, slope = _scores(call, queries, keys)
    weights = barrier(jnp.exp(scores - lse_BKGC[..., None]))
    dweights = product("BKGCH,BKWH->BKGCW", dout, keys.v)
    dscores = call.scale * weights * (dweights - delta_BKGC[..., None])
    if slope is not None:
        dscores *= slope
    # The barriers keep XLA:CPU from computing exp twice, and from transposing the large operand
    # of the last two products (half the speed) instead of their small results.
    dscores = barrier(dscores.astype(q.dtype))
    dq = product("BKGCW,BKWH->BKGCH", dscores, keys.k)
    dk = product("BKGCH,BKGCW->BKHW", q, dscores)
    dv = product("BKGCH,BKGCW->BKHW", dout, weights.astype(q.dtype))
    dk, dv = barrier((dk, dv))
    return dq.astype(q.dtype), dk, dv
