"""Linear cross-entropy that stores the logits for the backward pass.

One product computes all logits, and none is recomputed. They are stored in x's dtype, half the
memory of float32 for bfloat16 x; log-sum-exp, loss and probabilities are computed in float32.
XLA:CPU vectorizes only plain reductions, and a product that transposes its larger operand runs at
half speed: the CPU path avoids both.

Axes: N any number of token axes, D width, V rows of w.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention.backends.xla_chunk import barrier
from tjx_kernels.cross_entropy.terms import (
    CrossEntropyCall,
    Head,
    logits_gradient,
    token_loss,
    with_custom_vjp,
)
from tjx_kernels.target import current_target

# Logit of padding rows: below every logit, and finite, so differences are never NaN.
NO_LOGIT = -1e30

# x, head, labels, lse, logits
type _StoredResiduals = tuple[jax.Array, Head, jax.Array, jax.Array, jax.Array]


def _logits(call: CrossEntropyCall, x: jax.Array, head: Head) -> jax.Array:
    logits = jnp.einsum("...D,VD->...V", x, head.w.astype(x.dtype))
    if head.bias is not None:
        logits += head.bias.astype(x.dtype)[(None,) * (logits.ndim - 1)]
    return logits if call.soft_cap is None else call.soft_cap * jnp.tanh(logits / call.soft_cap)


def _column(logits: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _forward(
    call: CrossEntropyCall, x: jax.Array, head: Head, labels: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], _StoredResiduals]:
    stored = _logits(call, x, head)
    logits = stored.astype(jnp.promote_types(x.dtype, jnp.float32))
    in_vocab = (labels >= 0) & (labels < call.vocab_size)
    row = jnp.where(in_vocab, labels, 0)[..., None]
    target = jnp.take_along_axis(logits, row, axis=-1, mode="clip")[..., 0]
    padded = call.vocab_size < logits.shape[-1]
    counts = _column(logits) < call.vocab_size if padded else None
    total = jnp.sum(logits, axis=-1, where=counts) if call.label_smoothing else None
    lse = _log_sum_exp(logits if counts is None else jnp.where(counts, logits, NO_LOGIT))
    loss = token_loss(call, labels, lse, jnp.where(in_vocab, target, jnp.nan), total)
    return (loss, lse), (x, head, labels, lse, stored)


def _log_sum_exp(logits: jax.Array) -> jax.Array:
    """Compute the log-sum-exp over the last axis; in one pass over the logits except on CPUs."""
    if current_target().platform == "cpu":
        top = jnp.max(logits, axis=-1)
        return top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
    start = (jnp.full((), NO_LOGIT, logits.dtype), jnp.zeros((), logits.dtype))
    top, total = lax.reduce((logits, jnp.ones_like(logits)), start, _join_sums, (logits.ndim - 1,))
    lse: jax.Array = top + jnp.log(total)
    return lse


type _Sum = tuple[jax.Array, jax.Array]  # a maximum, and the sum of exp(logit - maximum)


def _join_sums(a: _Sum, b: _Sum) -> _Sum:
    factor = jnp.exp(-jnp.abs(a[0] - b[0]))
    total = jnp.where(a[0] >= b[0], a[1] + factor * b[1], factor * a[1] + b[1])
    return jnp.maximum(a[0], b[0]), total


def _backward(
    call: CrossEntropyCall, residuals: _StoredResiduals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, Head, None]:
    x, head, labels, lse, stored = residuals
    logits = stored.astype(lse.dtype)
    # The derivative of the cap is 1 - tanh^2, and the stored logits are cap * tanh.
    slope = None if call.soft_cap is None else 1 - jnp.square(logits / call.soft_cap)
    rows = head.w.shape[0]
    counts = jnp.arange(rows) < call.vocab_size if call.vocab_size < rows else None
    gradient = logits_gradient(call, labels, lse, cotangents, x.dtype)
    dlogits = gradient(logits, slope, labels[..., None] == _column(logits), counts)
    product = partial(jnp.einsum, preferred_element_type=lse.dtype)
    if current_target().platform == "cpu":
        # The barriers keep XLA from transposing dlogits instead of the small result.
        dlogits = barrier(dlogits)
        dw = barrier(product("...D,...V->DV", x, dlogits)).T
    else:
        dw = product("...V,...D->VD", dlogits, x)
    dhead = Head(dw.astype(head.w.dtype), None)
    if head.bias is not None:
        dbias = jnp.sum(dlogits, tuple(range(labels.ndim)), dtype=lse.dtype)
        dhead = dhead._replace(bias=dbias.astype(head.bias.dtype))
    dx = jnp.einsum("...V,VD->...D", dlogits, head.w.astype(x.dtype))
    return dx, dhead, None


# Loss and log-sum-exp per token, differentiable with respect to x and the head.
stored_logits_loss = with_custom_vjp(_forward, _backward)
