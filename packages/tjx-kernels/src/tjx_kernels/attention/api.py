"""The public attention function: checks, the table of implementations, and the choice among them.

A new kernel is one file that defines an `Implementation`, and one line in `IMPLEMENTATIONS`.
"""

from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp

from tjx_kernels.attention.arguments import Arguments, Shaped
from tjx_kernels.attention.backends import cudnn, reference, triton, xla
from tjx_kernels.attention.backends.mosaic_gpu import backend as mosaic_gpu
from tjx_kernels.attention.backends.tpu import backend as tpu
from tjx_kernels.attention.registry import Choice, UnsupportedCallError, notify
from tjx_kernels.attention.types import AttentionBackend, AttentionCall

# In order of preference: without a name, the first that supports the call runs. "cudnn" is first on
# NVIDIA GPUs: it is NVIDIA's own and the fastest known there. "triton" supports every call that
# "mosaic_gpu" does and precedes it until that kernel was measured on a GPU. "reference" is last and
# "xla" before it supports every call, so that a dense computation is never chosen by default.
BACKENDS: dict[str, AttentionBackend] = {
    "cudnn": cudnn.BACKEND,
    "triton": triton.BACKEND,
    "mosaic_gpu": mosaic_gpu.BACKEND,
    "tpu": tpu.BACKEND,
    "xla": xla.BACKEND,
    "reference": reference.BACKEND,
}


class Options(TypedDict, total=False):
    """The keyword arguments of `flash_attention` that change what is computed, or how."""

    causal: bool
    q_segment_ids: jax.Array | None
    kv_segment_ids: jax.Array | None
    window: int | None
    soft_cap: float | None
    scale: float | None
    q_offset: int | jax.Array
    bias: jax.Array | None
    alibi_slopes: jax.Array | None
    dropout_rate: float
    dropout_key: jax.Array | None
    implementation: str | None
    interpret: bool


@overload
def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[Options],
) -> jax.Array: ...


@overload
def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[jax.Array, jax.Array]: ...


def flash_attention(
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
    bias: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Exact attention in memory that is linear in the sequence length.

    Query i has the position q_offset + i, key j the position j. A row that sees no key is dead: its
    output is 0, its log-sum-exp -inf, and its gradients are 0.

    Parameters
    ----------
    q : [batch, q_len, heads, head_dim]
        Queries: float32, bfloat16 or float16 (float64 where JAX has it enabled). Any length, 0
        included.
    k, v : [batch, kv_len, kv_heads, head_dim]
        Keys and values of the same dtype. `heads` is a multiple of `kv_heads`: query heads
        n * g, ..., n * g + g - 1 share key head n (grouped-query attention; multi-query with one).
        The values' head_dim may be another than the keys' (latent attention); it is the output's.
    causal
        A query sees the keys up to its own position.
    q_segment_ids, kv_segment_ids : integers [batch, q_len], [batch, kv_len]
        A query sees only keys with its own id, as for documents packed into one row. Both or
        neither.
    window
        A query at position p sees keys from position p - window + 1 on: with `causal`, the
        `window` last keys, its own included. Without `causal`, keys after the query stay visible.
    soft_cap
        Scores s become soft_cap * tanh(s / soft_cap).
    scale
        Factor of the scores q k^T, before the cap; 1 / sqrt(head_dim) when None.
    q_offset
        Position of the first query: an int, or an int32 scalar or [batch] known only when the
        program runs (decoding into a KV cache). kv_len - q_len aligns the last query with the last
        key; 0 the first with the first.
    bias : floating [batch or 1, heads or 1, q_len, kv_len]
        Added to the scores after the cap; differentiable. It is quadratic in memory by itself.
    alibi_slopes : floating [heads] or [batch, heads]
        slope * |query's position - key's position| is subtracted from the scores after the cap
        (Press et al., "Train Short, Test Long", 2022). A constant: no gradient.
    dropout_rate
        Probability with which a weight of the softmax is set to 0, the others being multiplied by
        1 / (1 - dropout_rate). The LSE is that without dropout.
    dropout_key
        A key of `jax.random`; the same key drops the same weights, in every implementation.
    return_lse
        Also return the log-sum-exp.
    implementation
        One of `IMPLEMENTATIONS`, or None for the first that supports the call.
    interpret
        Run a Pallas kernel named by `implementation` in JAX's interpreter on the CPU: very slow,
        for debugging.

    Returns
    -------
    out : [batch, q_len, heads, head_dim]
        In q's dtype; softmax and sums are float32.
    lse : [batch, heads, q_len], only with `return_lse`
        Natural logarithm of the sum of the exponentials of a row's scores: float32 (float64 for
        float64 inputs), differentiable.

    Raises
    ------
    ValueError
        For arguments that do not fit together (one line for each), for an unknown implementation,
        and for an implementation asked for by name that cannot serve, with the reason.

    Notes
    -----
    Differentiable in reverse mode; for forward mode (`jax.jvp`) use `implementation="reference"`.
    Output and LSE carry the names "flash_attention_out" and "flash_attention_lse" for
    rematerialisation policies: keep both, or the forward pass runs again.

    References
    ----------
    Dao et al., "FlashAttention: fast and memory-efficient exact attention with IO-awareness", 2022.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> q = jnp.ones((2, 300, 8, 64))
    >>> kv = jnp.ones((2, 300, 2, 64))
    >>> out, lse = flash_attention(q, kv, kv, causal=True, return_lse=True)
    >>> out.shape, lse.shape
    ((2, 300, 8, 64), (2, 8, 300))
    """
    arguments = Arguments(
        q=q,
        k=k,
        v=v,
        causal=causal,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
        q_offset=q_offset,
        bias=bias,
        alibi_slopes=alibi_slopes,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        return_lse=return_lse,
        interpret=interpret,
    )
    call = arguments.describe()
    run = select(implementation, implementations_for(call), call).run
    if call.nothing_to_see:
        out, lse = dead_rows(call)
    else:
        out, lse = run(call, arguments.operands(call))
    return (out, lse) if return_lse else out


def dead_rows(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """Give the results of a call whose rows see no key."""
    out = jnp.zeros((call.batch, call.q_len, call.heads, call.v_head_dim), call.dtype)
    return out, jnp.full((call.batch, call.heads, call.q_len), -jnp.inf, call.accumulator)


def chosen_implementation(
    q: Shaped,
    k: Shaped,
    v: Shaped,
    *,
    implementation: str | None = None,
    return_lse: bool = False,
    **options: Any,
) -> str:
    """Name the implementation that `flash_attention` runs for these arguments.

    Nothing is computed; `jax.ShapeDtypeStruct` serves in place of arrays. Errors are those of
    `flash_attention`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((1, 8, 4, 64), jnp.bfloat16)
    >>> chosen_implementation(x, x, x, causal=True, implementation="reference")
    'reference'
    """
    call = Arguments(q=q, k=k, v=v, return_lse=return_lse, **options).describe()
    return choose(implementation, implementations_for(call))


def select(
    name: str | None, reasons: dict[str, str | None], call: AttentionCall
) -> AttentionBackend:
    """Return the implementation that `choose` names, and tell `observe_choices` of it."""
    chosen = choose(name, reasons)
    notify(Choice(chosen, name is not None, reasons, call))
    return BACKENDS[chosen]


def implementations_for(call: AttentionCall) -> dict[str, str | None]:
    """Say for each implementation why it cannot serve a call, or None where it can."""
    return {name: entry.supports(call) for name, entry in BACKENDS.items()}


def choose(name: str | None, reasons: dict[str, str | None]) -> str:
    """Take the implementation of that name, or without one the first with no reason against it."""
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"implementation is {name!r}; it must be one of {', '.join(BACKENDS)}, "
            "or None to choose automatically"
        )
    if name is None:
        able = [candidate for candidate, reason in reasons.items() if reason is None]
        if not able:  # without interpret, "xla" and "reference" serve whatever `describe` accepts
            raise ValueError(
                "no kernel that could be interpreted serves this call: "
                f"{'; '.join(f'{key}: {reason}' for key, reason in reasons.items())}; "
                "leave out interpret"
            )
        return able[0]
    if reasons[name] is not None:
        raise UnsupportedCallError(
            f"implementation {name!r} cannot serve this call: {reasons[name]}; "
            "change that, or give implementation=None to choose automatically"
        )
    return name
