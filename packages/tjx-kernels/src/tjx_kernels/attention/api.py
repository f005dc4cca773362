"""Exact attention for every platform, `flash_attention`, and the selection of its backend."""

from collections.abc import Callable
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp

from tjx_kernels.attention.backend import AttentionBackend
from tjx_kernels.attention.call import AttentionCall, bind_arguments
from tjx_kernels.attention.choices import Choice, current_observer
from tjx_kernels.attention.mask_functions import MaskMod
from tjx_kernels.attention.registry import REGISTRY
from tjx_kernels.attention.sinks import apply_sinks


class AttentionOptions(TypedDict, total=False):
    """Keyword arguments of `flash_attention`, without `return_lse`."""

    causal: bool
    q_segment_ids: jax.Array | None
    kv_segment_ids: jax.Array | None
    window: int | None
    symmetric_window: bool
    soft_cap: float | None
    scale: float | None
    q_offset: int | jax.Array
    bias: jax.Array | None
    mask: jax.Array | MaskMod | None
    alibi_slopes: jax.Array | None
    sinks: jax.Array | None
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
    **options: Unpack[AttentionOptions],
) -> jax.Array: ...


@overload
def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
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
    symmetric_window: bool = False,
    soft_cap: float | None = None,
    scale: float | None = None,
    q_offset: int | jax.Array = 0,
    bias: jax.Array | None = None,
    mask: jax.Array | MaskMod | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Compute exact softmax attention with memory linear in the sequence length.

    Query i has position q_offset + i and key j has position j. A row that attends to no key is
    dead: its output is 0, its log-sum-exp -inf, and its gradients are 0.

    Parameters
    ----------
    q : [batch, q_len, heads, head_dim]
        Queries: float32, bfloat16 or float16 (float64 if JAX enables it). q_len may be 0.
    k, v : [batch, kv_len, kv_heads, head_dim]
        Keys and values of the same dtype. `heads` is a multiple of `kv_heads`: with g = heads /
        kv_heads, query heads n * g, ..., n * g + g - 1 share key head n (grouped-query attention).
        The head_dim of v may differ from that of k (latent attention); the output has that of v.
    causal
        Mask keys after the query's position.
    q_segment_ids, kv_segment_ids : integers [batch, q_len], [batch, kv_len]
        A query attends only to keys with its own id: packed documents. Give both or neither.
    window
        Mask keys before position p - window + 1 of a query at position p. With `causal` that
        leaves the last `window` keys, its own included; without, later keys stay visible.
    symmetric_window
        Mask keys after position p + window - 1 too (bidirectional local attention).
    soft_cap
        Scores s become soft_cap * tanh(s / soft_cap).
    scale
        Factor of the scores q k^T, before the cap; 1 / sqrt(head_dim) when None.
    q_offset
        Position of the first query: an int, or a traced int32 scalar or [batch] (decoding with a
        KV cache). kv_len - q_len aligns the last query with the last key; 0 the first ones.
    bias : floating [batch or 1, heads or 1, q_len, kv_len]
        Added to the scores after the cap; differentiable. -inf masks a key. Its own memory is
        quadratic in the sequence length.
    mask : bool [batch or 1, heads or 1, q_len or 1, kv_len or 1], or a function
        True where a query attends to a key, besides the other masks. A function of (batch index,
        head index, query position, key index), int32 arrays that broadcast against each other,
        returns such a mask. An elementwise function (comparisons, logic and arithmetic) without
        other arrays is evaluated tile by tile and stores no mask; "triton" and "tpu" skip blocks
        that it masks. Define it once: JAX compiles again for a new function. All other masks
        become a bias, which is stored whole.
    alibi_slopes : floating [heads] or [batch, heads]
        slope * |query position - key position| is subtracted from the scores after the cap (Press
        et al., "Train Short, Test Long", 2022). Not differentiable.
    sinks : floating [heads]
        Logit of each head that joins the denominator of the softmax, as a key with the value 0
        would; differentiable. Does not affect the LSE, which the backend has to support.
    dropout_rate
        Probability that a softmax weight is set to 0; the others are multiplied by
        1 / (1 - dropout_rate). Does not affect the LSE.
    dropout_key
        PRNG key of `jax.random`; the same key drops the same weights in every backend.
    return_lse
        Also return the log-sum-exp.
    implementation
        Name of a backend: "cudnn", "triton", "mosaic_gpu", "tpu", "xla", "reference" or one added
        by `register_backend`. None selects the first that supports the call.
    interpret
        Run the Pallas kernel named by `implementation` in JAX's interpreter on the CPU: very slow,
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
        For invalid arguments (one line each), an unknown `implementation`, or a requested one that
        does not support the call, with the reason.

    Notes
    -----
    Differentiable in reverse mode; for forward mode (`jax.jvp`) use `implementation="reference"`.
    Output and LSE have the checkpoint names "flash_attention_out" and "flash_attention_lse": a
    rematerialization policy has to save both to avoid a second forward pass.

    References
    ----------
    Dao et al., "FlashAttention: fast and memory-efficient exact attention with IO-awareness", 2022.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> q, kv = jnp.ones((2, 300, 8, 64)), jnp.ones((2, 300, 2, 64))
    >>> out, lse = flash_attention(q, kv, kv, causal=True, return_lse=True)
    >>> out.shape, lse.shape
    ((2, 300, 8, 64), (2, 8, 300))

    A mask function: prefixes of 100 tokens that are visible to all tokens.

    >>> prefix = lambda batch, head, query, key: (key <= query) | (key < 100)
    >>> flash_attention(q, kv, kv, mask=prefix).shape
    (2, 300, 8, 64)
    """
    call, operands = bind_arguments(
        q,
        k,
        v,
        causal=causal,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        window=window,
        symmetric_window=symmetric_window,
        soft_cap=soft_cap,
        scale=scale,
        q_offset=q_offset,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        return_lse=return_lse,
        interpret=interpret,
    )
    backend = select_backend(implementation, call)
    out, lse = dead_rows(call) if call.is_empty else backend.run(call, operands)
    if sinks is not None:
        out = apply_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def dead_rows(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """Return output 0 and LSE -inf, the results of a call whose rows attend to no key."""
    out = jnp.zeros((call.batch, call.q_len, call.heads, call.v_head_dim), call.dtype)
    return out, jnp.full((call.batch, call.heads, call.q_len), -jnp.inf, call.accumulator)


def select_backend(
    name: str | None,
    call: AttentionCall,
    supports: Callable[[AttentionBackend], str | None] | None = None,
) -> AttentionBackend:
    """Return the backend that `choose_backend` names, and notify `observe_choices` of it."""
    chosen = choose_backend(name, call, supports)
    if observer := current_observer.get():
        reason = supports or (lambda entry: entry.refusal(call))
        reasons = {key: reason(entry) for key, entry in REGISTRY.entries.items()}
        observer(Choice(chosen, name is not None, reasons, call))
    return REGISTRY.entries[chosen]


def choose_backend(
    name: str | None,
    call: AttentionCall,
    supports: Callable[[AttentionBackend], str | None] | None = None,
) -> str:
    """Return the name of the backend that runs a call.

    Parameters
    ----------
    name
        Backend requested by the caller; None selects the first that supports the call.
    call
        The call on one device.
    supports
        Support test of a backend; None is the backend's own test of `call`. Ring attention tests
        all calls of its schedule.

    Raises
    ------
    ValueError
        If no backend has the name, or none supports the call.
    UnsupportedCallError
        If the requested backend does not support the call.
    """
    entries = REGISTRY.entries
    reason = supports or (lambda entry: entry.refusal(call))
    if name is None:
        for key, entry in entries.items():
            on_platform = entry.platforms is None or call.platform in entry.platforms
            if (on_platform or call.interpret) and reason(entry) is None:
                return key
        # Reached only with interpret: "xla" supports every other call.
        reasons = "; ".join(f"{key}: {reason(entry)}" for key, entry in entries.items())
        raise ValueError(
            f"interpret: got True; expected a call that a Pallas kernel supports ({reasons}); "
            "leave out interpret"
        )
    if name not in entries:
        raise ValueError(
            f"implementation: got {name!r}; expected one of {', '.join(entries)}, or None for "
            "automatic selection; correct the name, or add it with register_backend"
        )
    if (refusal := reason(entries[name])) is not None:
        raise UnsupportedCallError(
            f"implementation {name!r} cannot serve this call: {refusal}; "
            "change that, or give implementation=None to choose automatically"
        )
    return name


class UnsupportedCallError(ValueError):
    """The backend that the caller requested by name does not support the call."""
