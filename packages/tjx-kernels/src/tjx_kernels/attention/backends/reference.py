"""Dense reference implementation of `flash_attention`, with all scores in memory.

The tests compare every other backend with the same semantics.

Axes: B batch, T query length, S key length, K key heads, G query heads that share a key head, H
head_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tjx_kernels.attention import dropout
from tjx_kernels.attention.backend import AttentionBackend, BackwardInputs, Gradients
from tjx_kernels.attention.call import AttentionCall, Operands, bind_arguments, make_mask
from tjx_kernels.attention.sinks import apply_sinks


def attention_reference(
    q: jax.Array, k: jax.Array, v: jax.Array, *, return_lse: bool = False, **options: Any
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Compute dense attention, the reference for `flash_attention`.

    Differentiable in forward and reverse mode, to any order; float64 inputs are computed in
    float64.

    Parameters
    ----------
    q, k, v, return_lse, **options
        As for `flash_attention`, without `implementation` and `interpret`; results and errors too.

    Returns
    -------
    jax.Array or tuple of jax.Array
        As of `flash_attention`: the output, and the log-sum-exp with `return_lse`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> q = jnp.ones((1, 3, 4, 8))
    >>> kv = jnp.ones((1, 5, 2, 8))
    >>> attention_reference(q, kv, kv, causal=True).shape
    (1, 3, 4, 8)
    """
    out, lse = _run(*bind_arguments(q, k, v, return_lse=return_lse, **options))
    if (sinks := options.get("sinks")) is not None:
        out = apply_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def _run(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    scores_BKGTS = _scores(call, operands)
    # `initial` defines the maximum over no keys. A dead row has the maximum -inf, and -inf - -inf
    # is NaN: shift such rows by 0 instead.
    top = jnp.max(scores_BKGTS, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    weights_BKGTS = jnp.exp(scores_BKGTS - top)
    total = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    dead = total == 0
    total = jnp.where(dead, 1, total)
    weights_BKGTS = _drop(call, operands, weights_BKGTS / total)

    v_BSKH = operands.v.astype(call.accumulator)
    out_BKGTH = _product("BKGTS,BSKH->BKGTH", weights_BKGTS, v_BSKH)
    # The values are 0 already; the select blocks the gradients of dead rows.
    out_BTKGH = jnp.where(dead, 0, out_BKGTH).transpose(0, 3, 1, 2, 4)
    out = out_BTKGH.reshape(call.batch, call.q_len, call.heads, call.v_head_dim).astype(call.dtype)
    lse_BKGT = jnp.where(dead, -jnp.inf, top + jnp.log(total))[..., 0]
    return out, lse_BKGT.reshape(call.batch, call.heads, call.q_len)


def _product(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
    # Exact float32 products: the defaults are TF32 on GPUs and bfloat16 on TPUs.
    return jnp.einsum(axes, x, y, precision=jax.lax.Precision.HIGHEST)


def _scores(call: AttentionCall, operands: Operands) -> jax.Array:
    """Return the masked scores [B, K, G, T, S]."""
    dtype = call.accumulator
    groups = (call.kv_heads, call.group)
    q_BTKGH = operands.q.astype(dtype).reshape(call.batch, call.q_len, *groups, call.head_dim)
    scores = call.scale * _product("BTKGH,BSKH->BKGTS", q_BTKGH, operands.k.astype(dtype))
    if call.soft_cap is not None:
        scores = call.soft_cap * jnp.tanh(scores / call.soft_cap)

    first = call.q_offset if operands.q_offset is None else operands.q_offset
    # Indices and ids that broadcast against [B, K, G, T, S].
    row = jnp.arange(call.q_len).reshape(1, 1, 1, -1, 1)
    position = jnp.asarray(first).reshape(-1, 1, 1, 1, 1) + row
    key = jnp.arange(call.kv_len).reshape(1, 1, 1, 1, -1)
    if operands.alibi_slopes is not None:
        distance = jnp.abs(position - key).astype(dtype)
        slopes = operands.alibi_slopes.astype(dtype).reshape(call.batch, *groups, 1, 1)
        scores -= slopes * distance
    if operands.bias is not None:
        bias = jnp.broadcast_to(
            operands.bias.astype(dtype), (operands.bias.shape[0], call.heads, *scores.shape[3:])
        )
        scores += bias.reshape(-1, *groups, *scores.shape[3:])

    ids: list[jax.Array | None] = [None, None]
    if operands.q_segment_ids is not None and operands.kv_segment_ids is not None:
        ids = [
            operands.q_segment_ids[:, None, None, :, None],
            operands.kv_segment_ids[:, None, None, None, :],
        ]
    batch = jnp.arange(call.batch).reshape(-1, 1, 1, 1, 1)
    head = jnp.arange(call.heads).reshape(1, *groups, 1, 1)
    mask = make_mask(call, position, key, *ids, batch=batch, head=head)
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def _drop(call: AttentionCall, operands: Operands, weights_BKGTS: jax.Array) -> jax.Array:
    if operands.dropout_seed is None:
        return weights_BKGTS
    shape = (1, call.heads, call.q_len, call.kv_len)
    head, row, key = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2, 3))
    seed = operands.dropout_seed[:, :, None, None, None]
    kept = dropout.keep((seed[:, 0], seed[:, 1]), head, row, key, call.dropout_rate)
    kept = kept.reshape(weights_BKGTS.shape)
    return jnp.where(kept, weights_BKGTS / (1 - call.dropout_rate), 0)


def _backward(call: AttentionCall, operands: Operands, rows: BackwardInputs) -> Gradients:
    """Differentiate `_run` given the LSE and delta of whole rows and a part of their keys.

    With w = exp(lse of these keys - lse of all keys), the weights are w p and the gradient of the
    scores is w p (dp - delta), as for the cotangents w dout of the output and
    rowsum(out w dout) - w delta of the LSE.
    """

    def run(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return _run(call, operands._replace(q=q, k=k, v=v, bias=bias))

    (out, lse), pull = jax.vjp(run, operands.q, operands.k, operands.v, operands.bias)
    share_BNT = jnp.exp(lse - rows.lse)
    dtype = call.accumulator
    dout = share_BNT.swapaxes(1, 2)[..., None] * rows.dout.astype(dtype)
    dlse = jnp.einsum("BTNH,BTNH->BNT", out.astype(dtype), dout) - share_BNT * rows.delta
    return Gradients(*pull((dout.astype(call.dtype), dlse)))


BACKEND = AttentionBackend(run=_run, backward=_backward, masks=True)
