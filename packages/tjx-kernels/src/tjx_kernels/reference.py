"""Dense attention: the readable definition of what `flash_attention` computes.

Every other implementation is tested against this meaning. It keeps all scores in memory.

Axes: B batch, T query length, S key length, K key heads, G query heads that share a key head, H
head_dim.
"""

import jax
import jax.numpy as jnp

from tjx_kernels.attention_call import AttentionCall, Implementation, describe


def attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    q_offset: int | jax.Array = 0,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention with all scores in memory; the meaning of `flash_attention`'s arguments.

    It differentiates in forward and in reverse mode, to any order, and computes in float64 where
    its inputs are float64. Arguments, results and errors are those of `flash_attention`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> q = jnp.ones((1, 3, 4, 8))
    >>> kv = jnp.ones((1, 5, 2, 8))
    >>> attention_reference(q, kv, kv, causal=True).shape
    (1, 3, 4, 8)
    """
    call = describe(
        q,
        k,
        v,
        causal=causal,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
        q_offset=q_offset,
    )
    offset = None if isinstance(q_offset, int) else q_offset
    out, lse = _run(call, q, k, v, q_segment_ids, kv_segment_ids, offset)
    return (out, lse) if return_lse else out


def _run(
    call: AttentionCall,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    q_offset: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    dtype = call.accumulator
    groups = call.heads // call.kv_heads
    q_BTKGH = q.astype(dtype).reshape(*q.shape[:2], call.kv_heads, groups, call.head_dim)
    scores_BKGTS = call.scale * jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k.astype(dtype))
    if call.soft_cap is not None:
        scores_BKGTS = call.soft_cap * jnp.tanh(scores_BKGTS / call.soft_cap)
    visible = _visible(call, q_segment_ids, kv_segment_ids, q_offset)
    scores_BKGTS = jnp.where(visible, scores_BKGTS, -jnp.inf)

    # `initial` makes the maximum over no keys defined. A row that sees no key keeps the maximum
    # -inf, and -inf - -inf would be NaN: such rows are shifted by 0 instead.
    top = jnp.max(scores_BKGTS, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    weights_BKGTS = jnp.exp(scores_BKGTS - top)
    total = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    dead = total == 0
    total = jnp.where(dead, 1, total)

    out_BKGTH = jnp.einsum("BKGTS,BSKH->BKGTH", weights_BKGTS / total, v.astype(dtype))
    # Already 0; written out so that no gradient passes, whatever arrives for a dead row.
    out_BTKGH = jnp.where(dead, 0, out_BKGTH).transpose(0, 3, 1, 2, 4)
    lse_BKGT = jnp.where(dead, -jnp.inf, top + jnp.log(total))[..., 0]
    return out_BTKGH.reshape(q.shape).astype(q.dtype), lse_BKGT.reshape(
        call.batch, call.heads, call.q_len
    )


def _visible(
    call: AttentionCall,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    q_offset: jax.Array | None,
) -> jax.Array:
    """Which key each query sees: bool, broadcastable to [B, K, G, T, S]."""
    first = call.q_offset if q_offset is None else q_offset
    assert first is not None
    i_T1 = first + jnp.arange(call.q_len)[:, None]
    j_1S = jnp.arange(call.kv_len)[None, :]
    visible = jnp.ones((1, 1, 1, call.q_len, call.kv_len), bool)
    if call.causal:
        visible &= (j_1S <= i_T1)[None, None, None]
    if call.window is not None:
        visible &= (j_1S > i_T1 - call.window)[None, None, None]
    if q_segment_ids is not None and kv_segment_ids is not None:
        same_BTS = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
        visible = visible & same_BTS[:, None, None]
    return visible


def _supports(_call: AttentionCall) -> str | None:
    return None


IMPLEMENTATION = Implementation(run=_run, supports=_supports)
