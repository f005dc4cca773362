"""Linear cross-entropy in chunks of the vocabulary, forward and backward.

The forward pass accumulates sums per token; the backward pass recomputes the logits of each chunk
(Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, section 4). Hsu et
al., "Liger Kernel", 2024, chunk tokens instead. Chunking the vocabulary keeps the token axes whole:
with sharded tokens x is never gathered, and each row of w's gradient is reduced over devices once,
not once per chunk of tokens.

Axes: N any number of token axes, D width, V rows of w, C rows of a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention.backends.xla import barrier
from tjx_kernels.cross_entropy.stored_logits import (
    CrossEntropyCall,
    Head,
    logits_gradient,
    token_loss,
    with_custom_vjp,
)


class Sums(NamedTuple):
    """Running sums of the forward pass per token, [N] each."""

    top: jax.Array  # the largest logit so far
    total: jax.Array  # sum of exp(logit - top)
    target: jax.Array  # the label's logit; NaN before its chunk
    mean: jax.Array | None  # sum of the logits; only with label smoothing


type _Residuals = tuple[jax.Array, Head, jax.Array, jax.Array]  # x, head, labels, lse


# --- chunks of the vocabulary ---------------------------------------------------------------------
# Chunk i of n holds the rows i, n + i, 2 n + i, ...: if devices shard the rows of w, each of them
# owns a part of every chunk. The remaining rows, fewer than n, form the tail chunk.


def chunk_count(vocab: int, chunk_size: int) -> int:
    """Return the number of chunks, preferably a divisor of the vocabulary: it needs no tail."""
    wanted = -(-vocab // chunk_size)
    near = range(-(-wanted // 2), min(2 * wanted, vocab) + 1)
    divisors = (count for count in near if vocab % count == 0)
    return min(divisors, key=lambda count: max(count / wanted, wanted / count), default=wanted)


def _split(count: int, head: Head) -> tuple[Head, Head]:
    """Split the head into chunks [C, count, ...] and the tail [fewer than count, ...]."""
    whole = head.w.shape[0] // count * count
    chunks = jax.tree.map(lambda a: a[:whole].reshape(-1, count, *a.shape[1:]), head)
    return chunks, jax.tree.map(lambda a: a[whole:], head)


def _chunk(chunks: Head, index: jax.Array) -> Head:
    chunk: Head = jax.tree.map(lambda a: a[:, index], chunks)
    return chunk


def _row_in_chunk(
    call: CrossEntropyCall, labels: jax.Array, rows: int, index: jax.Array | int
) -> jax.Array:
    """Return the row of each label in chunk `index` (`chunks` is the tail), -1 if not in it."""
    count = call.chunks
    in_tail = labels >= rows * count
    row = jnp.where(in_tail, labels - rows * count, labels // count)
    chunk = jnp.where(in_tail, count, labels % count)
    return jnp.where((labels >= 0) & (labels < call.vocab_size) & (chunk == index), row, -1)


def _in_vocab(call: CrossEntropyCall, rows: int, index: jax.Array | int, size: int) -> jax.Array:
    """Return the mask of the rows of chunk `index` that are not padding, [C]."""
    row_C = jnp.arange(size)
    tail = rows * call.chunks + row_C
    return jnp.where(index == call.chunks, tail, row_C * call.chunks + index) < call.vocab_size


def capped_logits(
    x: jax.Array, head: Head, soft_cap: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """Return logits [N, C] and the derivative of the soft cap, None without a cap."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.einsum("...D,CD->...C", x, head.w.astype(x.dtype), preferred_element_type=dtype)
    if head.bias is not None:
        logits += head.bias.astype(dtype)[(None,) * (logits.ndim - 1)]
    if soft_cap is None:
        return logits, None
    bent = jnp.tanh(logits / soft_cap)
    return soft_cap * bent, 1 - bent * bent


# --- the differentiable function ------------------------------------------------------------------


def _forward(
    call: CrossEntropyCall, x: jax.Array, head: Head, labels: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], _Residuals]:
    count = call.chunks
    chunks, tail = _split(count, head)
    rows = chunks.w.shape[0]

    def step(sums: Sums, index: jax.Array | int, chunk: Head) -> Sums:
        logits, _ = capped_logits(x, chunk, call.soft_cap)
        row = _row_in_chunk(call, labels, rows, index)
        # A comparison, not a gather: with sharded rows of w each device compares its own rows.
        is_target = row[..., None] == jnp.arange(chunk.w.shape[0])[(None,) * row.ndim]
        # The barrier keeps XLA:CPU from recomputing the logits for this sum.
        found = jnp.sum(barrier(logits), axis=-1, where=is_target)
        mean = sums.mean
        if call.vocab_size < head.w.shape[0]:
            counts = _in_vocab(call, rows, index, chunk.w.shape[0])
            counts = counts[(None,) * (logits.ndim - 1)]
            # The first chunk contains row 0, so `top` is finite from the first step on.
            mean = None if mean is None else mean + jnp.sum(logits, axis=-1, where=counts)
            logits = jnp.where(counts, logits, -jnp.inf)
        elif mean is not None:
            mean += jnp.sum(logits, axis=-1)
        top = jnp.maximum(sums.top, jnp.max(logits, axis=-1))
        total = sums.total * jnp.exp(sums.top - top)
        total += jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
        return Sums(top, total, jnp.where(row >= 0, found, sums.target), mean)

    zeros = jnp.zeros(labels.shape, jnp.promote_types(x.dtype, jnp.float32))
    # For a label outside the vocabulary the target stays NaN.
    smooth = call.label_smoothing > 0
    sums = Sums(zeros - jnp.inf, zeros, zeros + jnp.nan, zeros if smooth else None)
    sums, _ = lax.scan(
        lambda carry, i: (step(carry, i, _chunk(chunks, i)), None), sums, jnp.arange(count)
    )
    if tail.w.size:
        sums = step(sums, count, tail)
    lse = sums.top + jnp.log(sums.total)
    loss = token_loss(call, labels, lse, sums.target, sums.mean)
    return (loss, lse), (x, head, labels, lse)


def _backward(
    call: CrossEntropyCall, residuals: _Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, Head, None]:
    x, head, labels, lse = residuals
    count, product = call.chunks, partial(jnp.einsum, preferred_element_type=lse.dtype)
    chunks, tail = _split(count, head)
    derivative = _derivative(call, residuals, cotangents)
    tokens = tuple(range(labels.ndim))

    def step(index: jax.Array | int, chunk: Head) -> tuple[jax.Array, Head]:
        # The barriers keep XLA:CPU from transposing dlogits instead of the small result.
        dlogits = barrier(derivative(index, chunk))
        dw_DC = barrier(product("...D,...C->DC", x, dlogits))
        dhead = Head(dw_DC.T, None)
        if chunk.bias is not None:
            dhead = dhead._replace(bias=jnp.sum(dlogits, tokens, dtype=lse.dtype))
        dhead = jax.tree.map(lambda d, a: d.astype(a.dtype), dhead, chunk)
        return product("...C,CD->...D", dlogits, chunk.w.astype(x.dtype)), dhead

    def next_chunk(
        carry: tuple[jax.Array, Head], i: jax.Array
    ) -> tuple[tuple[jax.Array, Head], None]:
        dx, dchunks = carry
        more_dx, dhead = step(i, _chunk(chunks, i))
        put = partial(lax.dynamic_update_index_in_dim, index=i, axis=1)
        return (dx + more_dx, jax.tree.map(put, dchunks, dhead)), None

    start = (jnp.zeros(x.shape, lse.dtype), jax.tree.map(jnp.zeros_like, chunks))
    (dx, dchunks), _ = lax.scan(next_chunk, start, jnp.arange(count))
    dhead = jax.tree.map(lambda d: d.reshape(-1, *d.shape[2:]), dchunks)
    if tail.w.size:
        more_dx, dtail = step(count, tail)
        dx = dx + more_dx
        dhead = jax.tree.map(lambda *parts: jnp.concatenate(parts), dhead, dtail)
    return dx.astype(x.dtype), dhead, None


def _derivative(
    call: CrossEntropyCall, residuals: _Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> Callable[[jax.Array | int, Head], jax.Array]:
    """Return the function from a chunk index and chunk to the gradient of x w^T in x's dtype."""
    x, head, labels, lse = residuals
    gradient = logits_gradient(call, labels, lse, cotangents, x.dtype)
    rows = head.w.shape[0] // call.chunks

    def derivative(index: jax.Array | int, chunk: Head) -> jax.Array:
        logits, slope = capped_logits(x, chunk, call.soft_cap)
        row = _row_in_chunk(call, labels, rows, index)
        hit = row[..., None] == lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        padded = call.vocab_size < head.w.shape[0]
        counts = _in_vocab(call, rows, index, chunk.w.shape[0]) if padded else None
        return gradient(logits, slope, hit, counts)

    return derivative


# Loss and log-sum-exp per token, differentiable with respect to x and the head. Compiled even if
# the caller is not: otherwise JAX would keep the logits of every operation.
chunked_loss = with_custom_vjp(_forward, _backward)
