"""The loss of a language model's head without the logits of all tokens in memory.

The vocabulary is taken in chunks: the forward pass keeps a running log-sum-exp of each token, the
backward pass computes each chunk's logits again. Sources: Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models", 2024, section 4; Hsu et al., "Liger Kernel", 2024, which chunks
tokens instead. Chunks of the vocabulary leave the tokens' axes whole: where tokens are spread over
devices nothing of x is gathered, and each row of w's gradient is reduced over devices once, not
once for each chunk of tokens.

Axes: N any number of token axes, D width, V vocabulary, C rows of w in a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.xla_chunk import barrier

# Size of a chunk when none is asked for. Small chunks stay in a CPU's cache, which there pays more
# than computing logits twice costs; below MIN_ROWS adding up x's gradient would show.
CHUNK_LOGITS = 2**20
MIN_ROWS = 1024


def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> jax.Array:
    """Cross-entropy of softmax(x w^T) against labels, for each token, in nats.

    Parameters
    ----------
    x : [..., d_model]
        The last hidden states: float32, bfloat16 or float16. Products are computed in this dtype
        with float32 results; the softmax is float32 (float64 for float64 x).
    w : [vocab, d_model]
        The head, in the layout of a tied embedding table. It may have another floating dtype than
        x, such as float32 masters under bfloat16 activations: chunks are cast as they are used,
        and its gradient is summed in float32 and has w's dtype.
    labels : integers [...]
        One for each token. A label outside the vocabulary that is not `ignore_index` makes the
        token's loss and gradients NaN.
    ignore_index
        Tokens with this label have the loss 0 and no gradient.
    chunk_size
        About how many rows of w a chunk has, so that the logits in memory are [..., chunk_size]:
        within a factor of two, the size that divides the vocabulary best. When None, the larger of
        `MIN_ROWS` and what makes `CHUNK_LOGITS` logits.

    Returns
    -------
    loss : float32 [...]
        Zero where ignored; sum it and divide by the number of tokens that count.

    Raises
    ------
    ValueError
        For shapes, dtypes or sizes that do not fit together, one line for each.

    Notes
    -----
    Differentiable in reverse mode only. For w spread over devices by rows, a vocabulary that is a
    multiple of many small numbers (50304 rather than 50257) lets each device keep to its own rows.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> x, w = jnp.ones((2, 3, 8)), jnp.zeros((16, 8))
    >>> loss = linear_cross_entropy(x, w, jnp.full((2, 3), -100).at[0, 0].set(5))
    >>> print(jnp.round(loss, 4))
    [[2.7726 0.     0.    ]
     [0.     0.     0.    ]]
    """
    _check(x, w, labels, chunk_size)
    vocab = w.shape[0]
    if chunk_size is None:
        chunk_size = max(MIN_ROWS, CHUNK_LOGITS // max(1, labels.size))
    count = _chunk_count(vocab, min(chunk_size, vocab))
    loss: jax.Array = _loss(count, ignore_index, x, w, labels.astype(jnp.int32))
    return loss


def _check(x: jax.Array, w: jax.Array, labels: jax.Array, chunk_size: int | None) -> None:
    problems = []
    if x.ndim < 1 or w.ndim != 2 or w.shape[1:] != x.shape[-1:] or 0 in w.shape:
        problems.append(
            f"x has shape {x.shape} and w {w.shape}; "
            "they must be [..., d_model] and [vocab, d_model], none of w's axes 0"
        )
    elif labels.shape != x.shape[:-1]:
        problems.append(
            f"labels has shape {labels.shape}; it must be x's without the last axis: {x.shape[:-1]}"
        )
    problems += [
        f"{name} is {array.dtype}; it must be floating: cast it first"
        for name, array in (("x", x), ("w", w))
        if not jnp.issubdtype(array.dtype, jnp.floating)
    ]
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        problems.append(f"labels is {labels.dtype}; it must be integers, such as int32")
    if chunk_size is not None and chunk_size < 1:
        problems.append(f"chunk_size is {chunk_size}; it counts rows of w: give 1 or more, or None")
    if problems:
        raise ValueError("\n".join(problems))


def _chunk_count(vocab: int, chunk_size: int) -> int:
    """Count the chunks; a number that divides the vocabulary leaves no tail to copy."""
    wanted = -(-vocab // chunk_size)
    near = range(-(-wanted // 2), min(2 * wanted, vocab) + 1)
    divisors = (count for count in near if vocab % count == 0)
    return min(divisors, key=lambda count: max(count / wanted, wanted / count), default=wanted)


# --- chunks of the vocabulary ---------------------------------------------------------------------
# Chunk i of n holds the rows i, n + i, 2 n + i, ...: where w is spread over devices by rows, each
# device then owns a part of every chunk. The rows left over by the division, fewer than n, follow
# as a chunk of their own, the tail.


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


def _logits(x: jax.Array, w_CD: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("...D,CD->...C", x, w_CD.astype(x.dtype), preferred_element_type=dtype)


# --- the differentiable function ------------------------------------------------------------------


def _loss_forward(
    count: int, ignore_index: int, x: jax.Array, w: jax.Array, labels: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    chunks_CnD, tail = _split(count, w)
    rows = chunks_CnD.shape[0]

    def step(
        running: tuple[jax.Array, ...], index: jax.Array | int, w_CD: jax.Array
    ) -> tuple[jax.Array, ...]:
        top, total, target = running
        logits = _logits(x, w_CD)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        total = total * jnp.exp(top - new_top) + jnp.sum(
            jnp.exp(logits - new_top[..., None]), axis=-1
        )
        row = _row_in_chunk(labels, count, rows, index)
        found = jnp.take_along_axis(logits, jnp.maximum(row, 0)[..., None], axis=-1)[..., 0]
        return new_top, total, jnp.where(row >= 0, found, target)

    dtype = jnp.promote_types(x.dtype, jnp.float32)
    zeros = jnp.zeros(labels.shape, dtype)
    # A label that no chunk holds leaves the target at NaN.
    running: tuple[jax.Array, ...] = (zeros - jnp.inf, zeros, zeros + jnp.nan)
    running, _ = lax.scan(
        lambda carry, i: (step(carry, i, chunks_CnD[:, i]), None), running, jnp.arange(count)
    )
    if tail.size:
        running = step(running, count, tail)
    top, total, target = running
    lse = top + jnp.log(total)
    loss = jnp.where(labels == ignore_index, 0, lse - target)
    return loss, (x, w, labels, lse)


def _loss_backward(
    count: int, ignore_index: int, residuals: tuple[jax.Array, ...], dloss: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, labels, lse = residuals
    outside = (labels < 0) | (labels >= w.shape[0])
    dloss = jnp.where(outside, jnp.nan, dloss)
    dloss = jnp.where(labels == ignore_index, 0, dloss)
    chunks_CnD, tail = _split(count, w)
    rows = chunks_CnD.shape[0]

    def step(index: jax.Array | int, w_CD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = _logits(x, w_CD)
        row = _row_in_chunk(labels, count, rows, index)
        hit = row[..., None] == lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        dlogits = (jnp.exp(logits - lse[..., None]) - hit) * dloss[..., None]
        # The barriers keep XLA:CPU from transposing dlogits instead of the small result.
        dlogits = barrier(dlogits.astype(x.dtype))
        product = partial(jnp.einsum, preferred_element_type=lse.dtype)
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


def _primal(
    count: int, ignore_index: int, x: jax.Array, w: jax.Array, labels: jax.Array
) -> jax.Array:
    return _loss_forward(count, ignore_index, x, w, labels)[0]


_differentiable = jax.custom_vjp(_primal, nondiff_argnums=(0, 1))
_differentiable.defvjp(_loss_forward, _loss_backward)
# Compiled also where the caller is not, or the logits of every operation would be kept.
_loss = jax.jit(_differentiable, static_argnums=(0, 1), inline=True)
