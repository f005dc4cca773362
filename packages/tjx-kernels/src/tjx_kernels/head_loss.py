"""The loss of a language model's head in chunks of its vocabulary, and its gradients.

The forward pass keeps running sums of each token, the backward pass computes each chunk's logits
again. Sources: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024,
section 4; Hsu et al., "Liger Kernel", 2024, which chunks tokens instead. Chunks of the vocabulary
leave the tokens' axes whole: where tokens are spread over devices nothing of x is gathered, and
each row of w's gradient is reduced over devices once, not once for each chunk of tokens.

With logits z, p = softmax(z), label y, smoothing s and z-loss weight a, a token's loss is

    lse(z) - (1 - s) z_y - s mean(z) + a lse(z)^2

and its derivative by z is (1 + 2 a lse) p - (1 - s) onehot(y) - s / vocab.

Axes: N any number of token axes, D width, V vocabulary, C rows of w in a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.xla_chunk import barrier


@dataclass(frozen=True, kw_only=True)
class HeadLoss:
    """The static part of one call of `linear_cross_entropy`.

    Attributes
    ----------
    chunks
        How many chunks the vocabulary is cut into, the tail not counted.
    ignore_index, z_loss, label_smoothing, soft_cap
        As given to `linear_cross_entropy`.
    """

    chunks: int
    ignore_index: int
    z_loss: float
    label_smoothing: float
    soft_cap: float | None


class Sums(NamedTuple):
    """What the forward pass keeps of each token, [N] each."""

    top: jax.Array  # the largest logit so far
    total: jax.Array  # sum of exp(logit - top)
    target: jax.Array  # the label's logit; NaN until its chunk comes
    mean: jax.Array | None  # sum of the logits, divided by the vocabulary; with smoothing only


# --- chunks of the vocabulary ---------------------------------------------------------------------
# Chunk i of n holds the rows i, n + i, 2 n + i, ...: where w is spread over devices by rows, each
# device then owns a part of every chunk. The rows left over by the division, fewer than n, follow
# as a chunk of their own, the tail.


def chunk_count(vocab: int, chunk_size: int) -> int:
    """Count the chunks; a number that divides the vocabulary leaves no tail to copy."""
    wanted = -(-vocab // chunk_size)
    near = range(-(-wanted // 2), min(2 * wanted, vocab) + 1)
    divisors = (count for count in near if vocab % count == 0)
    return min(divisors, key=lambda count: max(count / wanted, wanted / count), default=wanted)


def _split(count: int, w_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cut w into its chunks [C, count, D] and the tail [less than count, D]."""
    whole = w_VD.shape[0] // count * count
    return w_VD[:whole].reshape(-1, count, w_VD.shape[1]), w_VD[whole:]


def _row_in_chunk(labels: jax.Array, count: int, rows: int, index: jax.Array | int) -> jax.Array:
    """Row of each label in chunk `index` (`count` is the tail), -1 where it is in another chunk."""
    in_tail = labels >= rows * count
    row = jnp.where(in_tail, labels - rows * count, labels // count)
    chunk = jnp.where(in_tail, count, labels % count)
    return jnp.where((labels >= 0) & (chunk == index), row, -1)


def _logits(
    x: jax.Array, w_CD: jax.Array, soft_cap: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """Logits [N, C], and the derivative of the soft cap where there is one."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.einsum("...D,CD->...C", x, w_CD.astype(x.dtype), preferred_element_type=dtype)
    if soft_cap is None:
        return logits, None
    bent = jnp.tanh(logits / soft_cap)
    return soft_cap * bent, 1 - bent * bent


# --- the differentiable function ------------------------------------------------------------------


def _forward(
    call: HeadLoss, x: jax.Array, w: jax.Array, labels: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    count, vocab = call.chunks, w.shape[0]
    chunks_CnD, tail = _split(count, w)
    rows = chunks_CnD.shape[0]

    def step(sums: Sums, index: jax.Array | int, w_CD: jax.Array) -> Sums:
        logits, _ = _logits(x, w_CD, call.soft_cap)
        top = jnp.maximum(sums.top, jnp.max(logits, axis=-1))
        total = sums.total * jnp.exp(sums.top - top)
        total += jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
        row = _row_in_chunk(labels, count, rows, index)
        found = jnp.take_along_axis(logits, jnp.maximum(row, 0)[..., None], axis=-1)[..., 0]
        target = jnp.where(row >= 0, found, sums.target)
        mean = None if sums.mean is None else sums.mean + jnp.sum(logits, axis=-1) / vocab
        return Sums(top, total, target, mean)

    zeros = jnp.zeros(labels.shape, jnp.promote_types(x.dtype, jnp.float32))
    # A label that no chunk holds leaves the target at NaN.
    smooth = call.label_smoothing > 0
    sums = Sums(zeros - jnp.inf, zeros, zeros + jnp.nan, zeros if smooth else None)
    sums, _ = lax.scan(
        lambda carry, i: (step(carry, i, chunks_CnD[:, i]), None), sums, jnp.arange(count)
    )
    if tail.size:
        sums = step(sums, count, tail)
    lse = sums.top + jnp.log(sums.total)
    target = sums.target
    if sums.mean is not None:
        # Also where label_smoothing is 1, the NaN of a label outside the vocabulary stays.
        target = (1 - call.label_smoothing) * target + call.label_smoothing * sums.mean
    loss = lse - target
    if call.z_loss:
        loss += call.z_loss * lse * lse
    loss = jnp.where(labels == call.ignore_index, 0, loss)
    return (loss, lse), (x, w, labels, lse)


def _backward(
    call: HeadLoss, residuals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
    x, w, _, lse = residuals
    count, product = call.chunks, partial(jnp.einsum, preferred_element_type=lse.dtype)
    chunks_CnD, tail = _split(count, w)
    derivative = _derivative(call, residuals, cotangents)

    def step(index: jax.Array | int, w_CD: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The barriers keep XLA:CPU from transposing dlogits instead of the small result.
        dlogits = barrier(derivative(index, w_CD))
        dw_DC = barrier(product("...D,...C->DC", x, dlogits))
        return product("...C,CD->...D", dlogits, w_CD.astype(x.dtype)), dw_DC.T

    def chunk(
        carry: tuple[jax.Array, jax.Array], i: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        dx, dw_CnD = carry
        more_dx, dw_CD = step(i, chunks_CnD[:, i])
        dw_CnD = lax.dynamic_update_index_in_dim(dw_CnD, dw_CD.astype(w.dtype), i, axis=1)
        return (dx + more_dx, dw_CnD), None

    start = (jnp.zeros(x.shape, lse.dtype), jnp.zeros_like(chunks_CnD))
    (dx, dw_CnD), _ = lax.scan(chunk, start, jnp.arange(count))
    dw = dw_CnD.reshape(-1, w.shape[1])
    if tail.size:
        more_dx, dw_tail = step(count, tail)
        dx, dw = dx + more_dx, jnp.concatenate([dw, dw_tail.astype(w.dtype)])
    return dx.astype(x.dtype), dw, None


def _derivative(
    call: HeadLoss, residuals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> Callable[[jax.Array | int, jax.Array], jax.Array]:
    """Make the function from a chunk's index and rows to the gradient of x w^T, in x's dtype."""
    x, w, labels, lse = residuals
    dloss, dlse = cotangents
    vocab = w.shape[0]
    dloss = jnp.where((labels < 0) | (labels >= vocab), jnp.nan, dloss)
    dloss = jnp.where(labels == call.ignore_index, 0, dloss)
    dlse = dlse + dloss * (1 + 2 * call.z_loss * lse) if call.z_loss else dlse + dloss
    dtarget = dloss * (1 - call.label_smoothing)
    dmean = dloss * (call.label_smoothing / vocab)
    rows = vocab // call.chunks

    def derivative(index: jax.Array | int, w_CD: jax.Array) -> jax.Array:
        logits, slope = _logits(x, w_CD, call.soft_cap)
        row = _row_in_chunk(labels, call.chunks, rows, index)
        hit = row[..., None] == lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        dlogits = jnp.exp(logits - lse[..., None]) * dlse[..., None]
        dlogits -= jnp.where(hit, dtarget[..., None], 0)
        if call.label_smoothing:
            dlogits -= dmean[..., None]
        if slope is not None:
            dlogits *= slope
        return dlogits.astype(x.dtype)

    return derivative


def _primal(
    call: HeadLoss, x: jax.Array, w: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _forward(call, x, w, labels)[0]


_differentiable = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_differentiable.defvjp(_forward, _backward)
_compiled = jax.jit(_differentiable, static_argnums=0, inline=True)


def head_loss(
    call: HeadLoss, x: jax.Array, w: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss and log-sum-exp of each token, both differentiable by x and w.

    Compiled also where the caller is not, or the logits of every operation would be kept.
    """
    loss, lse = _compiled(call, x, w, labels)
    return loss, lse
