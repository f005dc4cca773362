"""Linear cross-entropy that stores the logits for the backward pass.

One product computes all logits, and none is recomputed. They are stored in x's dtype, half the
memory of float32 for bfloat16 x; log-sum-exp, loss and probabilities are computed in float32.
XLA:CPU vectorizes only plain reductions, and a product that transposes its larger operand runs at
half speed: the CPU path avoids both.

With logits z, p = softmax(z), label y, smoothing s and z-loss weight a, a token's loss is

    lse(z) - (1 - s) z_y - s mean(z) + a lse(z)^2

and its derivative by z is (1 + 2 a lse) p - (1 - s) onehot(y) - s / vocab. `chunked` uses the same
functions for both.

Axes: N any number of token axes, D width, V rows of w, C some of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention.backends.xla import barrier
from tjx_kernels.target import current_target

# --- call, token loss and its derivative ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CrossEntropyCall:
    """Static part of a call of `linear_cross_entropy`.

    Attributes
    ----------
    chunks
        Number of chunks of the rows of w, without the tail; 0 stores all logits.
    vocab_size
        Rows of w in the vocabulary; the others are padding.
    ignore_index, z_loss, label_smoothing, soft_cap
        As given to `linear_cross_entropy`.
    """

    chunks: int
    vocab_size: int
    ignore_index: int
    z_loss: float
    label_smoothing: float
    soft_cap: float | None


class Head(NamedTuple):
    """Rows of w [V, D], or a chunk of them, and their bias [V] or None."""

    w: jax.Array
    bias: jax.Array | None


# (logits [N, C], soft-cap derivative or None, one-hot labels [N, C], vocabulary mask [C] or None)
type LogitsGradient = Callable[
    [jax.Array, jax.Array | None, jax.Array, jax.Array | None], jax.Array
]


def token_loss(
    call: CrossEntropyCall,
    labels: jax.Array,
    lse: jax.Array,
    target: jax.Array,
    total: jax.Array | None,
) -> jax.Array:
    """Return the loss of each token, [N], from its LSE and target logit.

    Parameters
    ----------
    call
        The static part of the call.
    labels
        Labels of `linear_cross_entropy`.
    lse
        Log-sum-exp of each token's logits.
    target
        The label's logit, NaN where the label is outside the vocabulary.
    total
        Sum of the logits; only with label smoothing.
    """
    if total is not None:
        # With label_smoothing 1 too, a label outside the vocabulary gives NaN.
        mean = total / call.vocab_size
        target = (1 - call.label_smoothing) * target + call.label_smoothing * mean
    loss = lse - target
    if call.z_loss:
        loss += call.z_loss * lse * lse
    return jnp.where(labels == call.ignore_index, 0, loss)


def logits_gradient(
    call: CrossEntropyCall,
    labels: jax.Array,
    lse: jax.Array,
    cotangents: tuple[jax.Array, jax.Array],
    dtype: jax.typing.DTypeLike,
) -> LogitsGradient:
    """Return the function from logits to the gradient of x w^T, in `dtype`.

    Parameters
    ----------
    call, labels, lse
        As for `token_loss`.
    cotangents
        Cotangents of the loss and of the log-sum-exp, [N] each.
    dtype
        Dtype of the result, that of x.
    """
    dloss, dlse = cotangents
    dloss = jnp.where((labels < 0) | (labels >= call.vocab_size), jnp.nan, dloss)
    dloss = jnp.where(labels == call.ignore_index, 0, dloss)
    dlse = dlse + dloss * (1 + 2 * call.z_loss * lse) if call.z_loss else dlse + dloss
    dtarget = dloss * (1 - call.label_smoothing)
    dmean = dloss * (call.label_smoothing / call.vocab_size)

    def gradient(
        logits: jax.Array, slope: jax.Array | None, hit: jax.Array, counts: jax.Array | None
    ) -> jax.Array:
        dlogits = jnp.exp(logits - lse[..., None]) * dlse[..., None]
        dlogits -= jnp.where(hit, dtarget[..., None], 0)
        if call.label_smoothing:
            dlogits -= dmean[..., None]
        if slope is not None:
            dlogits *= slope
        if counts is not None:
            dlogits = jnp.where(counts[(None,) * (dlogits.ndim - 1)], dlogits, 0)
        return dlogits.astype(dtype)

    return gradient


# (call, x, head, labels) -> loss and log-sum-exp of each token
type Loss = Callable[[CrossEntropyCall, jax.Array, Head, jax.Array], tuple[jax.Array, jax.Array]]


def with_custom_vjp(forward: Callable[..., Any], backward: Callable[..., Any]) -> Loss:
    """Return the compiled loss function of a forward and a backward pass for `jax.custom_vjp`."""

    def primal(
        call: CrossEntropyCall, x: jax.Array, head: Head, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        result: tuple[jax.Array, jax.Array] = forward(call, x, head, labels)[0]
        return result

    function = jax.custom_vjp(primal, nondiff_argnums=(0,))
    function.defvjp(forward, backward)
    compiled: Loss = jax.jit(function, static_argnums=0, inline=True)
    return compiled


# --- implementation with stored logits ------------------------------------------------------------

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
    on_cpu = current_target().platform == "cpu"
    dlogits = barrier(dlogits) if on_cpu else dlogits
    if on_cpu and dlogits.size > x.size + head.w.size:
        # The barrier keeps XLA from transposing dlogits instead of x and the result.
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
