"""Divergence of two output heads in chunks of the vocabulary: `linear_kl_divergence`.

The divergence of a token is

    KL(q || p) = sum_v q_v (y_v - z_v) - lse(y) + lse(z)

with logits z of the student and y of the teacher, both divided by the temperature. The forward pass
accumulates the two log-sum-exps and the weighted sum over chunks of the vocabulary. The backward
pass recomputes the logits of each chunk; its derivative by z is p - q.

Axes: N any number of token axes, D width of the student, E of the teacher, V rows of a head, C rows
of a chunk.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention.backends.xla import barrier
from tjx_kernels.cross_entropy.api import CHUNK_LOGITS, MIN_ROWS
from tjx_kernels.cross_entropy.chunked import capped_logits, chunk_count
from tjx_kernels.cross_entropy.stored_logits import NO_LOGIT, Head
from tjx_kernels.target import current_target


@dataclass(frozen=True, kw_only=True)
class _Call:
    """Static part of a call; `chunks` chunks of `size` rows hold the vocabulary."""

    chunks: int
    size: int
    vocab_size: int
    temperature: float
    soft_cap: float | None
    teacher_soft_cap: float | None


class _Heads(NamedTuple):
    """Inputs of both heads: x [N, D], w [V, D] of the student and u [N, E], t [V, E]."""

    x: jax.Array
    w: jax.Array
    u: jax.Array
    t: jax.Array


class _Sums(NamedTuple):
    """Running sums of the forward pass per token, [N] each."""

    top: jax.Array  # the largest logit of the student so far
    total: jax.Array  # sum of exp(z - top)
    teacher_top: jax.Array
    teacher_total: jax.Array
    cross: jax.Array  # sum of exp(y - teacher_top) (y - z)


def linear_kl_divergence(
    x: jax.Array,
    w: jax.Array,
    teacher_x: jax.Array,
    teacher_w: jax.Array,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    chunk_size: int | None = None,
    token_shards: int = 1,
) -> jax.Array:
    """Compute KL(teacher || student) of the next token, without storing all logits.

    The logits are x w^T and teacher_x teacher_w^T, divided by the temperature. This is the
    distillation loss of Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section
    2, up to the entropy of the teacher; multiply it by temperature^2 as there.

    Parameters
    ----------
    x : [..., d_model]
        Hidden states of the student: float32, bfloat16, float16 or float64. Products take this
        dtype and accumulate in float32; the softmax is float32 (float64 for float64 x).
    w : [vocab, d_model]
        Output projection of the student.
    teacher_x : [..., teacher_d_model]
        Hidden states of the teacher; not differentiated.
    teacher_w : [teacher_vocab, teacher_d_model]
        Output projection of the teacher; not differentiated.
    temperature
        Divisor of the logits, above 0; larger ones give the improbable tokens more weight.
    vocab_size
        Vocabulary size if w or teacher_w is padded to more rows; None is their number of rows.
    soft_cap, teacher_soft_cap
        As of `linear_cross_entropy`, of each model.
    chunk_size
        Rows of a chunk, so that twice [..., chunk_size] logits are in memory; None as of
        `linear_cross_entropy`.
    token_shards
        Number of devices that shard the tokens, to choose the chunk size per device.

    Returns
    -------
    float32 [...]
        Divergence of each token in nats, at least 0 up to rounding.

    Raises
    ------
    ValueError
        For shapes that do not match or invalid options.

    Notes
    -----
    Differentiable with respect to x and w, in reverse mode only.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> x, w = jnp.ones((1, 2)), jnp.zeros((4, 2))
    >>> teacher_w = jnp.log(jnp.array([[0.5], [0.5], [1e-9], [1e-9]]))
    >>> print(linear_kl_divergence(x, w, jnp.ones((1, 1)), teacher_w).round(4))  # log 2
    [0.6931]
    """
    _check(x, w, teacher_x, teacher_w, temperature)
    if vocab_size is None:
        if len(w) != len(teacher_w):
            raise ValueError(
                f"w, teacher_w: got {len(w)} and {len(teacher_w)} rows; expected the same "
                "vocabulary; give vocab_size if one is padded"
            )
        vocab_size = len(w)
    if not 1 <= vocab_size <= min(len(w), len(teacher_w)):
        raise ValueError(
            f"vocab_size: got {vocab_size}; expected 1 to {min(len(w), len(teacher_w))}, the rows "
            "of w and teacher_w"
        )
    tokens = max(1, x.size // x.shape[-1] // token_shards)
    if chunk_size is None:
        chunk_size = max(MIN_ROWS, CHUNK_LOGITS[current_target().platform] // tokens)
    chunks = chunk_count(vocab_size, min(chunk_size, vocab_size))
    call = _Call(
        chunks=chunks,
        size=-(-vocab_size // chunks),
        vocab_size=vocab_size,
        temperature=temperature,
        soft_cap=soft_cap,
        teacher_soft_cap=teacher_soft_cap,
    )
    divergence: jax.Array = _divergence(call, _Heads(x, w, teacher_x, teacher_w))
    return divergence


def _check(
    x: jax.Array, w: jax.Array, teacher_x: jax.Array, teacher_w: jax.Array, temperature: float
) -> None:
    for name, hidden, table in (("", x, w), ("teacher_", teacher_x, teacher_w)):
        if hidden.ndim < 1 or table.ndim != 2 or table.shape[1:] != hidden.shape[-1:]:
            raise ValueError(
                f"{name}x, {name}w: got shapes {hidden.shape} and {table.shape}; expected "
                "[..., d_model] and [vocab, d_model]; correct one of them"
            )
    if x.shape[:-1] != teacher_x.shape[:-1]:
        raise ValueError(
            f"teacher_x: got shape {teacher_x.shape}; expected the tokens of x, {x.shape[:-1]}; "
            "give both models the same tokens"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature}; expected a finite number above 0")


# Chunk i holds the rows i, chunks + i, 2 chunks + i, ...: see `chunked`.


def _split(call: _Call, w: jax.Array) -> jax.Array:
    """Return the rows in chunks [C, chunks, D], with rows of zeros at the end."""
    rows = call.chunks * call.size
    padded = jnp.pad(w[:rows], ((0, max(rows - len(w), 0)), (0, 0)))
    return padded.reshape(call.size, call.chunks, -1)


def _logits(
    call: _Call, heads: _Heads, w: jax.Array, t: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return z and y of chunk `index` [N, C], and the derivative of z by the student's logits."""
    z, slope = capped_logits(heads.x, Head(w[:, index], None), call.soft_cap)
    y, _ = capped_logits(heads.u, Head(t[:, index], None), call.teacher_soft_cap)
    row = jnp.arange(call.size) * call.chunks + index
    counts = (row < call.vocab_size)[(None,) * (z.ndim - 1)]
    z, y = (jnp.where(counts, each.astype(z.dtype) / call.temperature, NO_LOGIT) for each in (z, y))
    return z, y, slope


def _forward(call: _Call, heads: _Heads) -> tuple[jax.Array, tuple[_Heads, jax.Array, jax.Array]]:
    w, t = _split(call, heads.w), _split(call, heads.t)

    def step(sums: _Sums, index: jax.Array) -> tuple[_Sums, None]:
        z, y, _ = _logits(call, heads, w, t, index)
        top = jnp.maximum(sums.top, z.max(-1))
        total = sums.total * jnp.exp(sums.top - top) + jnp.exp(z - top[..., None]).sum(-1)
        teacher_top = jnp.maximum(sums.teacher_top, y.max(-1))
        shrink, weights = (
            jnp.exp(sums.teacher_top - teacher_top),
            jnp.exp(y - teacher_top[..., None]),
        )
        return _Sums(
            top,
            total,
            teacher_top,
            sums.teacher_total * shrink + weights.sum(-1),
            sums.cross * shrink + (weights * (y - z)).sum(-1),
        ), None

    dtype = jnp.promote_types(heads.x.dtype, jnp.float32)
    zeros = jnp.zeros(heads.x.shape[:-1], dtype)
    # The first chunk contains row 0, so the tops are logits from the first step on.
    start = _Sums(zeros + NO_LOGIT, zeros, zeros + NO_LOGIT, zeros, zeros)
    sums, _ = lax.scan(step, start, jnp.arange(call.chunks))
    lse = sums.top + jnp.log(sums.total)
    teacher_lse = sums.teacher_top + jnp.log(sums.teacher_total)
    found = sums.cross / sums.teacher_total - teacher_lse + lse
    return found, (heads, lse, teacher_lse)


def _backward(
    call: _Call, residuals: tuple[_Heads, jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[_Heads]:
    heads, lse, teacher_lse = residuals
    w, t = _split(call, heads.w), _split(call, heads.t)
    product = partial(jnp.einsum, preferred_element_type=lse.dtype)
    scale = (cotangent / call.temperature)[..., None]

    def step(
        carry: tuple[jax.Array, jax.Array], index: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        dx, dw = carry
        z, y, slope = _logits(call, heads, w, t, index)
        dlogits = scale * (jnp.exp(z - lse[..., None]) - jnp.exp(y - teacher_lse[..., None]))
        if slope is not None:
            dlogits *= slope
        # The barriers keep XLA:CPU from transposing dlogits instead of the small result.
        dlogits = barrier(dlogits.astype(heads.x.dtype))
        chunk = w[:, index].astype(heads.x.dtype)
        dchunk = barrier(product("...D,...C->DC", heads.x, dlogits)).T.astype(w.dtype)
        dw = lax.dynamic_update_index_in_dim(dw, dchunk, index, axis=1)
        return (dx + product("...C,CD->...D", dlogits, chunk), dw), None

    start = (jnp.zeros(heads.x.shape, lse.dtype), jnp.zeros_like(w))
    (dx, dw), _ = lax.scan(step, start, jnp.arange(call.chunks))
    rows = dw.reshape(-1, dw.shape[-1])[: len(heads.w)]
    dw = jnp.pad(rows, ((0, len(heads.w) - len(rows)), (0, 0)))
    return (_Heads(dx.astype(heads.x.dtype), dw, None, None),)  # type: ignore[arg-type]  # no gradient


# Compiled even if the caller is not: otherwise JAX would keep the logits of every operation.
_differentiable = jax.custom_vjp(lambda call, heads: _forward(call, heads)[0], nondiff_argnums=(0,))
_differentiable.defvjp(_forward, _backward)
_divergence = jax.jit(_differentiable, static_argnums=0, inline=True)
