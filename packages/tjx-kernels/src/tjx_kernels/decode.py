"""Attention of new queries to a KV cache: `decode_attention`.

On CPUs and TPUs a loop reads the cache in place, block by block, up to the longest filled row, and
merges the results by their log-sum-exp (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018). On GPUs a loop with a traced trip count synchronizes with the host in every
iteration, so the whole cache is read at once.

Axes: B batch, N heads, K key heads, G query heads that share a key head, T new queries, S keys of
the cache, H head_dim, V head_dim of the values.
"""

from functools import partial
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax import lax

from tjx_kernels.attention.api import dead_rows
from tjx_kernels.attention.backends.xla import Chunk, Index, forward_chunk
from tjx_kernels.attention.call import AttentionCall, Operands, bind_arguments
from tjx_kernels.attention.sinks import apply_sinks

# Keys per block: few enough to read little beyond the longest row, many enough to amortize the
# loop.
RUN = 256

# Output [B, K, G, T, V] and LSE [B, K, G, T] over the keys so far.
type Partial = tuple[jax.Array, jax.Array]
# Factors of int8 keys and values [B, S, K].
type Scales = tuple[jax.Array, jax.Array] | None


@overload
def decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    *,
    return_lse: Literal[False] = ...,
    window: int | None = ...,
    soft_cap: float | None = ...,
    scale: float | None = ...,
    alibi_slopes: jax.Array | None = ...,
    sinks: jax.Array | None = ...,
    k_scale: jax.Array | None = ...,
    v_scale: jax.Array | None = ...,
) -> jax.Array: ...


@overload
def decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    *,
    return_lse: Literal[True],
    window: int | None = ...,
    soft_cap: float | None = ...,
    scale: float | None = ...,
    alibi_slopes: jax.Array | None = ...,
    sinks: jax.Array | None = ...,
    k_scale: jax.Array | None = ...,
    v_scale: jax.Array | None = ...,
) -> tuple[jax.Array, jax.Array]: ...


def decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Compute causal attention of new queries to a KV cache with a length per batch row.

    Query t of row b has position lengths[b] - new + t; the result is that of `flash_attention` with
    `causal=True` and `q_offset=lengths - new`. A query without a key is dead: its output is 0 and
    its log-sum-exp -inf.

    On CPUs and TPUs the time is proportional to the longest length (with a window, to the keys from
    the first visible one on). On GPUs it is proportional to max_len, without a synchronization with
    the host: keep max_len close to the lengths and grow it in few steps, as each one recompiles.

    Parameters
    ----------
    q : [batch, new, heads, head_dim]
        Queries of the last tokens, one or a few: float32, bfloat16 or float16.
    k_cache, v_cache : [batch, max_len, kv_heads, head_dim]
        Keys and values of the dtype of q, or int8, including those of the new tokens. `heads` is a
        multiple of `kv_heads`. The head_dim of v_cache may differ from that of k_cache; the output
        has it.
    lengths : integers [batch]
        Filled keys of each row, from 0 (an idle row) to max_len. Entries beyond them must be finite
        and do not affect the result.
    window, soft_cap, scale, alibi_slopes, sinks
        As for `flash_attention`.
    k_scale, v_scale : float32 [batch, max_len, kv_heads]
        Factors of int8 keys and values; both or neither.
    return_lse
        Also return the log-sum-exp.

    Returns
    -------
    out : [batch, new, heads, head_dim]
        In q's dtype; softmax and sums are float32.
    lse : [batch, heads, new], only with `return_lse`
        Natural logarithm of the sum of the exponentials of a query's scores, in float32.

    Raises
    ------
    ValueError
        For invalid arguments, one line each; k and v denote the caches.

    Notes
    -----
    For every platform. On CPUs and TPUs it has no reverse-mode derivative, as the trip count is
    traced: train with `flash_attention`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> q = jnp.ones((2, 1, 8, 64))
    >>> cache = jnp.zeros((2, 4096, 2, 64))
    >>> decode_attention(q, cache, cache, jnp.array([17, 300])).shape
    (2, 1, 8, 64)
    """
    right = lengths.shape == q.shape[:1] and jnp.issubdtype(lengths.dtype, jnp.integer)
    if q.ndim == 4 and not right:
        raise ValueError(
            f"lengths: got {lengths.dtype}{list(lengths.shape)}; expected int32 [batch], "
            f"{list(q.shape[:1])}; reshape or cast it"
        )
    scales = None if k_scale is None or v_scale is None else (k_scale, v_scale)
    _check_scales(k_cache, v_cache, k_scale, v_scale)
    # The call is that of keys and values in the dtype of the queries.
    k, v = (x if scales is None else _as_dtype(x, q.dtype) for x in (k_cache, v_cache))
    call, operands = bind_arguments(
        q,
        k,
        v,
        causal=True,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
        q_offset=lengths,  # the position after the last query
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        return_lse=return_lse,
    )
    operands = operands._replace(k=k_cache, v=v_cache)
    out, lse = dead_rows(call) if call.is_empty else _decode(call, operands, scales)
    if sinks is not None:
        out = apply_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def _as_dtype(x: jax.Array, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype)  # type: ignore[no-untyped-call]  # as jax is


def _check_scales(
    k: jax.Array, v: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None
) -> None:
    """Raise ValueError for int8 caches without scales, or scales that do not fit."""
    problems = []
    for name, x, scale in (("k", k, k_scale), ("v", v, v_scale)):
        got = "None" if scale is None else f"{scale.dtype}{list(scale.shape)}"
        wanted = f"float32{list(x.shape[:3])}" if x.dtype == jnp.int8 else "None"
        if got != wanted:
            problems.append(
                f"{name}_scale: got {got} for {name} {x.dtype}{list(x.shape)}; expected {wanted}; "
                "int8 caches need both scales, others none"
            )
    if problems:
        raise ValueError("\n".join(problems))


@partial(jax.jit, static_argnums=0, inline=True)
def _decode(call: AttentionCall, operands: Operands, scales: Scales) -> Partial:
    by_runs = partial(_partial_results, call, at_once=False)
    # A program lowered for one platform contains that platform's branch only.
    out, lse = lax.platform_dependent(
        operands,
        scales,
        cpu=by_runs,
        tpu=by_runs,
        default=partial(_partial_results, call, at_once=True),
    )
    out = out.transpose(0, 3, 1, 2, 4).reshape(*operands.q.shape[:3], call.v_head_dim)
    return out.astype(call.dtype), lse.reshape(call.batch, call.heads, call.q_len)


def _partial_results(
    call: AttentionCall, operands: Operands, scales: Scales = None, *, at_once: bool
) -> Partial:
    """Attend to all keys, in blocks of `RUN` keys or at once."""
    assert operands.q_offset is not None
    lengths_B = operands.q_offset
    groups = (call.kv_heads, call.group)
    q_BTKGH = operands.q.reshape(call.batch, call.q_len, *groups, call.head_dim)
    slopes = operands.alibi_slopes
    newest = Chunk(
        q=q_BTKGH.transpose(0, 2, 3, 1, 4),
        k=operands.k,
        v=operands.v,
        row=0,
        key=0,
        position=lengths_B - call.q_len,
        slopes=None if slopes is None else slopes.reshape(call.batch, *groups),
    )

    def add_run(first: Index, width: int, before: Partial | None) -> Partial:
        k, v = (
            lax.dynamic_slice_in_dim(x, first, width, 1).swapaxes(1, 2)
            for x in (operands.k, operands.v)
        )
        if scales is not None:
            factors = (lax.dynamic_slice_in_dim(x, first, width, 1).mT for x in scales)
            k, v = (
                (x * f[..., None]).astype(call.dtype) for x, f in zip((k, v), factors, strict=True)
            )
        found = forward_chunk(call, newest._replace(k=k, v=v, key=first))
        return found if before is None else _merge(before, found)

    if at_once:
        return add_run(0, call.kv_len, None)
    per_query = (call.batch, *groups, call.q_len)
    seen = (
        jnp.zeros((*per_query, call.v_head_dim), call.accumulator),
        jnp.full(per_query, -jnp.inf, call.accumulator),
    )
    whole, rest = divmod(call.kv_len, RUN)
    if whole:
        start, stop = _runs(call, lengths_B)
        seen = lax.fori_loop(start, stop, lambda i, x: add_run(i * RUN, RUN, x), seen)
    if rest:  # read unconditionally
        seen = add_run(whole * RUN, rest, seen)
    return seen


def _runs(call: AttentionCall, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the range of full key blocks that contains all keys visible to any row."""
    stop = jnp.max(lengths_B) + RUN - 1
    start = jnp.zeros_like(stop)
    if call.window is not None:
        # Idle rows attend to no key: exclude them from the minimum.
        first_B = lengths_B - call.q_len - call.window + 1
        first_B = jnp.where(lengths_B > 0, first_B, call.kv_len)
        start = jnp.maximum(jnp.min(first_B), 0)
    return start // RUN, jnp.minimum(stop // RUN, call.kv_len // RUN)


def _merge(a: Partial, b: Partial) -> Partial:
    """Merge the results over two disjoint sets of keys by their LSE."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    top = jnp.maximum(lse_a, lse_b)
    top = jnp.where(top == -jnp.inf, 0, top)  # no key in either set: both weights are 0
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    share_a, share_b = (
        jnp.where(total == 0, 0, x / jnp.where(total == 0, 1, total))[..., None]
        for x in (weight_a, weight_b)
    )
    return share_a * out_a + share_b * out_b, top + jnp.log(total)
