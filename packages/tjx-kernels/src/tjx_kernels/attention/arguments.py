"""Validation of the arguments of an attention call."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tjx_kernels.attention import dropout
from tjx_kernels.attention.types import AttentionCall, Operands
from tjx_kernels.target import current_target, deterministic_ops

# Arrays, tracers or their specifications: validation reads shapes and dtypes only.
Shaped = jax.Array | jax.ShapeDtypeStruct

DTYPES = ("float32", "bfloat16", "float16", "float64")


def bind_arguments(q: Any, k: Any, v: Any, **options: Any) -> tuple[AttentionCall, Operands]:
    """Validate the arguments of `flash_attention` and split them into static part and arrays.

    Raises
    ------
    ValueError
        As `describe_call`.
    """
    call = describe_call(q, k, v, **options)
    offset = slopes = seed = None
    if call.q_offset is None:
        offset = jnp.broadcast_to(options["q_offset"].astype(jnp.int32), (call.batch,))
    if call.alibi:
        slopes = options["alibi_slopes"].astype(jnp.float32)
        slopes = jnp.broadcast_to(slopes.reshape(-1, call.heads), (call.batch, call.heads))
    if call.dropout_rate:
        seed = dropout.seeds(options["dropout_key"], call.batch)
    q_ids, kv_ids = (
        None if (x := options.get(name)) is None else x.astype(jnp.int32)
        for name in ("q_segment_ids", "kv_segment_ids")
    )
    return call, Operands(q, k, v, q_ids, kv_ids, offset, options.get("bias"), slopes, seed)


def describe_call(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    q_offset: Any = 0,
    bias: Any = None,
    alibi_slopes: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    return_lse: bool = False,
    interpret: bool = False,
) -> AttentionCall:
    """Validate the arguments of `flash_attention` and return the static part of the call.

    Every array may be a `jax.ShapeDtypeStruct`.

    Raises
    ------
    ValueError
        With one line for each invalid argument.
    """
    # Ranks first: the other checks index the axes.
    _raise_all(
        [
            f"{name}: got shape {x.shape}; expected [batch, length, heads, head_dim]; reshape it"
            for name, x in (("q", q), ("k", k), ("v", v))
            if x.ndim != 4
        ]
    )
    _raise_all(
        [
            *_device_problems({"q": q, "k": k, "v": v, "bias": bias}),
            *_shape_problems(q, k, v),
            *_segment_problems(q, k, q_segment_ids, kv_segment_ids),
            *_score_problems(window, soft_cap, scale),
            *_bias_problems(q, k, bias, alibi_slopes),
            *_offset_problems(q, q_offset),
            *_dropout_problems(dropout_rate, dropout_key),
        ]
    )
    batch, q_len, heads, head_dim = q.shape
    kv_len, kv_heads, v_head_dim = v.shape[1:]
    target = current_target()
    return AttentionCall(
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        dtype=jnp.dtype(q.dtype).name,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        scale=head_dim**-0.5 if scale is None else float(scale),
        dropout_rate=float(dropout_rate),
        segment_ids=q_segment_ids is not None,
        alibi=alibi_slopes is not None,
        bias=None if bias is None else bias.shape[:2],
        q_offset=q_offset if isinstance(q_offset, int) else None,
        return_lse=return_lse,
        platform=target.platform,
        architecture=target.architecture,
        interpret=interpret,
        deterministic=deterministic_ops(),
    )


def _device_problems(arrays: Mapping[str, Any]) -> list[str]:
    """Check that committed arrays share their devices; uncommitted ones follow the others."""
    placed = {
        name: x.devices()
        for name, x in arrays.items()
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed
    }
    first = next(iter(placed), None)
    return [
        f"{name}: got devices {_names(devices)}; expected those of {first}, "
        f"{_names(placed[first])}; move one with jax.device_put"
        for name, devices in placed.items()
        if first is not None and devices != placed[first]
    ]


def _names(devices: Iterable[jax.Device]) -> str:
    return ", ".join(sorted(map(str, devices)))


def _shape_problems(q: Shaped, k: Shaped, v: Shaped) -> list[str]:
    problems = []
    heads, kv_heads = q.shape[2], k.shape[2]
    if k.shape[:3] != v.shape[:3]:
        problems.append(
            f"v: got shape {v.shape} with k {k.shape}; expected the same axes except the last, "
            "head_dim; correct one of them"
        )
    if k.shape[0] != q.shape[0]:
        problems.append(
            f"k: got batch {k.shape[0]} with q {q.shape[0]}; expected the same; correct one of them"
        )
    if k.shape[3] != q.shape[3]:
        problems.append(
            f"k: got head_dim {k.shape[3]} with q {q.shape[3]}; expected the same; correct one of "
            "them"
        )
    if q.shape[3] < 1 or v.shape[3] < 1:
        problems.append("head_dim: got 0; expected 1 or more; correct the last axis of q, k and v")
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        problems.append(
            f"q: got {heads} heads with {kv_heads} in k; expected a multiple of kv_heads, both 1 "
            "or more; correct one of them"
        )
    dtypes = [jnp.dtype(x.dtype).name for x in (q, k, v)]
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        problems.append(
            f"q, k, v: got dtypes {', '.join(dtypes)}; expected one of {', '.join(DTYPES)} for all "
            "three; cast them first"
        )
    return problems


def _segment_problems(
    q: Shaped, k: Shaped, q_segment_ids: Shaped | None, kv_segment_ids: Shaped | None
) -> list[str]:
    if (q_segment_ids is None) != (kv_segment_ids is None):
        given, missing = ("kv_segment_ids", "q_segment_ids")
        if kv_segment_ids is None:
            given, missing = missing, given
        return [f"{missing}: got None with {given}; expected both or neither; give both"]
    problems = []
    for name, ids, x in (
        ("q_segment_ids", q_segment_ids, q),
        ("kv_segment_ids", kv_segment_ids, k),
    ):
        if ids is None:
            continue
        if ids.shape != x.shape[:2]:
            problems.append(
                f"{name}: got shape {ids.shape}; expected [batch, length] {x.shape[:2]}; reshape it"
            )
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            problems.append(f"{name}: got {ids.dtype}; expected integers; cast it to int32")
    return problems


def _score_problems(window: int | None, soft_cap: float | None, scale: float | None) -> list[str]:
    problems = []
    if window is not None and window < 1:
        problems.append(
            f"window: got {window}; expected the number of keys that a query attends to, its own "
            "included; give 1 or more, or None"
        )
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        problems.append(
            f"soft_cap: got {soft_cap}; expected a finite number > 0; give None for no cap"
        )
    if scale is not None and not math.isfinite(scale):
        problems.append(
            f"scale: got {scale}; expected a finite number; give None for 1 / sqrt(head_dim)"
        )
    return problems


def _bias_problems(q: Shaped, k: Shaped, bias: Shaped | None, slopes: Shaped | None) -> list[str]:
    problems = []
    batch, q_len, heads, _ = q.shape
    if bias is not None:
        allowed = [{1, batch}, {1, heads}, {q_len}, {k.shape[1]}]
        if bias.ndim != 4 or any(n not in a for n, a in zip(bias.shape, allowed, strict=True)):
            problems.append(
                f"bias: got shape {bias.shape}; expected [batch or 1, heads or 1, q_len, kv_len], "
                f"[{batch} or 1, {heads} or 1, {q_len}, {k.shape[1]}]; reshape it"
            )
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            problems.append(
                f"bias: got {bias.dtype}; expected a floating dtype; for a boolean mask give "
                "jnp.where(mask, 0.0, -jnp.inf)"
            )
    if slopes is not None and (
        slopes.shape not in ((heads,), (batch, heads))
        or not jnp.issubdtype(slopes.dtype, jnp.floating)
    ):
        problems.append(
            f"alibi_slopes: got {slopes.dtype}{list(slopes.shape)}; expected floating [heads] or "
            f"[batch, heads], [{heads}] or [{batch}, {heads}]; reshape or cast it"
        )
    return problems


def _offset_problems(q: Shaped, offset: Any) -> list[str]:
    if isinstance(offset, int) or (
        offset.shape in ((), (q.shape[0],)) and jnp.issubdtype(offset.dtype, jnp.integer)
    ):
        return []
    return [
        f"q_offset: got {offset.dtype}{list(offset.shape)}; expected an int, an int32 scalar or "
        f"int32 [batch], [{q.shape[0]}]; reshape or cast it"
    ]


def _dropout_problems(rate: float, key: Any) -> list[str]:
    problems = []
    if not 0 <= rate < 1:
        problems.append(f"dropout_rate: got {rate}; expected 0 <= rate < 1; correct it")
    if rate > 0 and key is None:
        problems.append(
            f"dropout_key: got None with dropout_rate {rate}; expected a PRNG key; give "
            "jax.random.key(seed), or dropout_rate=0.0"
        )
    return problems


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))
