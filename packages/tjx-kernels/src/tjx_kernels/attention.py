"""The public attention function: checks, the table of implementations, and the choice among them.

A new kernel is one file that defines an `Implementation`, and one line in `IMPLEMENTATIONS`.
"""

from typing import Literal, overload

import jax
import jax.numpy as jnp

from tjx_kernels import attention_xla, reference
from tjx_kernels.attention_call import AttentionCall, Implementation, Shaped, describe

# In order of preference: without a name, the first that supports the call runs. "reference"
# stands last and "xla" before it supports whatever it does, so that nothing dense is ever chosen
# unasked.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": attention_xla.IMPLEMENTATION,
    "reference": reference.IMPLEMENTATION,
}


@overload
def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = ...,
    q_segment_ids: jax.Array | None = ...,
    kv_segment_ids: jax.Array | None = ...,
    window: int | None = ...,
    soft_cap: float | None = ...,
    scale: float | None = ...,
    q_offset: int | jax.Array = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> jax.Array: ...


@overload
def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = ...,
    q_segment_ids: jax.Array | None = ...,
    kv_segment_ids: jax.Array | None = ...,
    window: int | None = ...,
    soft_cap: float | None = ...,
    scale: float | None = ...,
    q_offset: int | jax.Array = ...,
    return_lse: Literal[True],
    implementation: str | None = ...,
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
    return_lse: bool = False,
    implementation: str | None = None,
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
        Position of the first query: an int, or an int32 scalar known only when the program runs
        (decoding into a KV cache). With an int, keys that no query of a block can see cost
        nothing.
    return_lse
        Also return the log-sum-exp.
    implementation
        One of `IMPLEMENTATIONS`, or None for the first that supports the call.

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
    call = describe(
        q,
        k,
        v,
        causal=causal,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
        q_offset=q_offset,
    )
    run = IMPLEMENTATIONS[_choose(call, implementation)].run
    if call.batch == 0 or call.q_len == 0 or call.kv_len == 0:  # nothing to see: all rows are dead
        out = jnp.zeros(q.shape, q.dtype)
        lse = jnp.full((call.batch, call.heads, call.q_len), -jnp.inf, call.accumulator)
    else:
        offset = None if isinstance(q_offset, int) else q_offset.astype(jnp.int32)
        out, lse = run(call, q, k, v, q_segment_ids, kv_segment_ids, offset)
    return (out, lse) if return_lse else out


def chosen_implementation(
    q: Shaped,
    k: Shaped,
    v: Shaped,
    *,
    causal: bool = False,
    q_segment_ids: Shaped | None = None,
    kv_segment_ids: Shaped | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    q_offset: int | Shaped = 0,
    implementation: str | None = None,
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
    call = describe(
        q,
        k,
        v,
        causal=causal,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
        q_offset=q_offset,
    )
    return _choose(call, implementation)


def implementations_for(call: AttentionCall) -> dict[str, str | None]:
    """Say for each implementation why it cannot serve a call, or None where it can."""
    return {name: entry.supports(call) for name, entry in IMPLEMENTATIONS.items()}


def _choose(call: AttentionCall, name: str | None) -> str:
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {name!r}; it must be one of {', '.join(IMPLEMENTATIONS)}, "
            "or None to choose automatically"
        )
    reasons = implementations_for(call)
    if name is None:
        able = [candidate for candidate, reason in reasons.items() if reason is None]
        assert able, "'xla' and 'reference' serve every call that `describe` accepts"
        return able[0]
    if reasons[name] is not None:
        raise ValueError(
            f"implementation {name!r} cannot serve this call: {reasons[name]}; "
            "change that, or give implementation=None to choose automatically"
        )
    return name
