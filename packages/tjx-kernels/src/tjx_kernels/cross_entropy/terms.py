"""Shared parts of both cross-entropy implementations: call, token loss and its derivative.

With logits z, p = softmax(z), label y, smoothing s and z-loss weight a, a token's loss is

    lse(z) - (1 - s) z_y - s mean(z) + a lse(z)^2

and its derivative by z is (1 + 2 a lse) p - (1 - s) onehot(y) - s / vocab.

Axes: N any number of token axes, V rows of w, C some of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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
