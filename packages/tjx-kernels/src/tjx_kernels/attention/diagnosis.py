"""Diagnosis of a backend choice: the reason, a test compilation, and the next candidate."""

from dataclasses import replace
from typing import Any

import jax

from tjx_kernels.attention.api import choose_backend
from tjx_kernels.attention.call import AttentionCall, Operands, describe_call
from tjx_kernels.attention.choices import Choice
from tjx_kernels.attention.option_checks import Shaped
from tjx_kernels.attention.registry import backends
from tjx_kernels.attention.support_table import PLAIN


def explain_choice(choice: Choice) -> str:
    """Describe in half a line which backend runs and why; omits backends of other devices.

    Examples
    --------
    >>> from tjx_kernels.attention.support_table import PLAIN
    >>> explain_choice(Choice("xla", True, {"xla": None}, PLAIN))
    'xla (requested by name)'
    """
    if choice.by_name:
        return f"{choice.name} (requested by name)"
    call = choice.call
    plain = replace(PLAIN, platform=call.platform, architecture=call.architecture)
    passed = [
        f"{name}: {reason}"
        for name, reason in choice.reasons.items()
        if reason is not None and backends()[name].refusal(plain) is None
    ]
    device = call.architecture or call.platform
    return (
        "; ".join([f"{choice.name} (the first that supports this call on {device}", *passed]) + ")"
    )


def next_choice(choice: Choice) -> str | None:
    """Return the next backend in order of preference that supports the call, or None."""
    names = list(choice.reasons)
    place = names.index(choice.name)
    others = [*names[place + 1 :], *names[:place]]
    return next((name for name in others if choice.reasons[name] is None), None)


def compile_failure(choice: Choice) -> Exception | None:
    """Compile forward and backward pass of a call alone; return the compiler's error or None."""
    run, (operands, dout) = backends()[choice.name].run, _abstract(choice.call)

    def both_passes(operands: Operands, dout: Any) -> Any:
        moving = (operands.q, operands.k, operands.v, operands.bias)

        def attend(q: Any, k: Any, v: Any, bias: Any) -> jax.Array:
            return run(choice.call, operands._replace(q=q, k=k, v=v, bias=bias))[0]

        out, backward = jax.vjp(attend, *moving)
        return out, backward(dout)

    try:
        jax.jit(both_passes).lower(operands, dout).compile()
    except Exception as error:  # compilers raise anything
        return error
    return None


def _abstract(call: AttentionCall) -> tuple[Operands, Any]:
    """Return the shapes and dtypes of the operands and of the output cotangent of a call."""
    shaped: Any = jax.ShapeDtypeStruct  # which has no types
    kv = (call.batch, call.kv_len, call.kv_heads)
    q = shaped((call.batch, call.q_len, call.heads, call.head_dim), call.dtype)
    operands = Operands(
        q=q,
        k=shaped((*kv, call.head_dim), call.dtype),
        v=shaped((*kv, call.v_head_dim), call.dtype),
    )
    if call.segment_ids:
        q_ids, kv_ids = (shaped((call.batch, n), "int32") for n in (call.q_len, call.kv_len))
        operands = operands._replace(q_segment_ids=q_ids, kv_segment_ids=kv_ids)
    if call.q_offset is None:
        operands = operands._replace(q_offset=shaped((call.batch,), "int32"))
    if call.bias is not None:
        bias = shaped((*call.bias, call.q_len, call.kv_len), call.dtype)
        operands = operands._replace(bias=bias)
    if call.alibi:
        operands = operands._replace(alibi_slopes=shaped((call.batch, call.heads), "float32"))
    if call.dropout_rate:
        operands = operands._replace(dropout_seed=shaped((call.batch, 2), "uint32"))
    return operands, shaped((*q.shape[:3], call.v_head_dim), call.dtype)


def chosen_implementation(
    q: Shaped,
    k: Shaped,
    v: Shaped,
    *,
    implementation: str | None = None,
    return_lse: bool = False,
    **options: Any,
) -> str:
    """Return the name of the backend that `flash_attention` selects for these arguments.

    Computes nothing.

    Parameters
    ----------
    q, k, v, implementation, return_lse, **options
        As for `flash_attention`, as are the errors; `jax.ShapeDtypeStruct` may replace arrays. A
        `mask` is an elementwise function; others are given as the bias that they become.

    Returns
    -------
    str
        Name of the backend.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((1, 8, 4, 64), jnp.bfloat16)
    >>> chosen_implementation(x, x, x, causal=True, implementation="reference")
    'reference'
    """
    call = describe_call(q, k, v, return_lse=return_lse, **options)
    return choose_backend(implementation, call)
