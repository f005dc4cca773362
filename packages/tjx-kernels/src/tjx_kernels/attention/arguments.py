"""Check the arguments of an attention call and describe it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from tjx_kernels.attention import dropout
from tjx_kernels.attention.types import AttentionCall, Operands
from tjx_kernels.target import current_target, deterministic_ops

# Shapes and dtypes are all that a description needs: real arrays, tracers or specifications.
Shaped = jax.Array | jax.ShapeDtypeStruct

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments of `flash_attention` as the user gave them."""

    q: Any
    k: Any
    v: Any
    causal: bool = False
    q_segment_ids: Any = None
    kv_segment_ids: Any = None
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    q_offset: Any = 0
    bias: Any = None
    alibi_slopes: Any = None
    dropout_rate: float = 0.0
    dropout_key: Any = None
    return_lse: bool = False
    interpret: bool = False

    def describe(self) -> AttentionCall:
        """Check the call and describe it.

        Raises
        ------
        ValueError
            With one line for each thing that is wrong.
        """
        # Ranks first: nothing else can be said of arrays that have no such axes.
        _raise_all(
            [
                f"{name} has shape {x.shape}; it must be [batch, length, heads, head_dim]"
                for name, x in (("q", self.q), ("k", self.k), ("v", self.v))
                if x.ndim != 4
            ]
        )
        _raise_all(
            [
                *_device_problems({"q": self.q, "k": self.k, "v": self.v, "bias": self.bias}),
                *_shape_problems(self.q, self.k, self.v),
                *_segment_problems(self.q, self.k, self.q_segment_ids, self.kv_segment_ids),
                *_score_problems(self),
                *_offset_problems(self),
                *_dropout_problems(self),
            ]
        )
        batch, q_len, heads, head_dim = self.q.shape
        kv_len, kv_heads, v_head_dim = self.v.shape[1:]
        target = current_target()
        return AttentionCall(
            batch=batch,
            q_len=q_len,
            kv_len=kv_len,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            dtype=jnp.dtype(self.q.dtype).name,
            causal=self.causal,
            window=self.window,
            soft_cap=self.soft_cap,
            scale=head_dim**-0.5 if self.scale is None else float(self.scale),
            dropout_rate=float(self.dropout_rate),
            segment_ids=self.q_segment_ids is not None,
            alibi=self.alibi_slopes is not None,
            bias=None if self.bias is None else self.bias.shape[:2],
            q_offset=self.q_offset if isinstance(self.q_offset, int) else None,
            return_lse=self.return_lse,
            platform=target.platform,
            architecture=target.architecture,
            interpret=self.interpret,
            deterministic=deterministic_ops(),
        )

    def operands(self, call: AttentionCall) -> Operands:
        """Bring the arrays into the one form that implementations take."""
        offset = slopes = seed = None
        if call.q_offset is None:
            offset = jnp.broadcast_to(self.q_offset.astype(jnp.int32), (call.batch,))
        if call.alibi:
            slopes = self.alibi_slopes.astype(jnp.float32)
            slopes = jnp.broadcast_to(slopes.reshape(-1, call.heads), (call.batch, call.heads))
        if call.dropout_rate:
            seed = dropout.seeds(self.dropout_key, call.batch)
        q_ids, kv_ids = (
            None if x is None else x.astype(jnp.int32)
            for x in (self.q_segment_ids, self.kv_segment_ids)
        )
        return Operands(self.q, self.k, self.v, q_ids, kv_ids, offset, self.bias, slopes, seed)


def _device_problems(arrays: Mapping[str, Any]) -> list[str]:
    """Name arrays that were put on different devices; uncommitted ones follow the others."""
    places = {
        name: x.devices()
        for name, x in arrays.items()
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed
    }
    first = next(iter(places), None)
    return [
        f"{first} is on {_names(places[first])} and {name} on {_names(devices)}; they must be on "
        "the same devices: move one with jax.device_put"
        for name, devices in places.items()
        if first is not None and devices != places[first]
    ]


def _names(devices: Iterable[jax.Device]) -> str:
    return ", ".join(sorted(map(str, devices)))


def _shape_problems(q: Shaped, k: Shaped, v: Shaped) -> list[str]:
    problems = []
    heads, kv_heads = q.shape[2], k.shape[2]
    if k.shape[:3] != v.shape[:3]:
        problems.append(
            f"k has shape {k.shape} and v {v.shape}; they may differ in head_dim, the last axis, "
            "alone"
        )
    if k.shape[0] != q.shape[0]:
        problems.append(f"q has batch {q.shape[0]} and k {k.shape[0]}; they must be the same")
    if k.shape[3] != q.shape[3]:
        problems.append(f"q has head_dim {q.shape[3]} and k {k.shape[3]}; they must be the same")
    if q.shape[3] < 1 or v.shape[3] < 1:
        problems.append("head_dim is 0; it must be 1 or more")
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        problems.append(
            f"q has {heads} heads and k has {kv_heads}; heads must be a multiple of kv_heads, "
            "both 1 or more"
        )
    dtypes = [jnp.dtype(x.dtype).name for x in (q, k, v)]
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        problems.append(
            f"q, k, v have dtypes {', '.join(dtypes)}; they must share one of {', '.join(DTYPES)}: "
            "cast them first"
        )
    return problems


def _segment_problems(
    q: Shaped, k: Shaped, q_segment_ids: Shaped | None, kv_segment_ids: Shaped | None
) -> list[str]:
    if (q_segment_ids is None) != (kv_segment_ids is None):
        given, missing = ("kv_segment_ids", "q_segment_ids")
        if kv_segment_ids is None:
            given, missing = missing, given
        return [f"{given} is given without {missing}; give both or neither"]
    problems = []
    for name, ids, x in (
        ("q_segment_ids", q_segment_ids, q),
        ("kv_segment_ids", kv_segment_ids, k),
    ):
        if ids is None:
            continue
        if ids.shape != x.shape[:2]:
            problems.append(
                f"{name} has shape {ids.shape}; it must be {x.shape[:2]}: [batch, length]"
            )
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            problems.append(f"{name} is {ids.dtype}; segment ids must be integers, such as int32")
    return problems


def _score_problems(given: Arguments) -> list[str]:
    problems = []
    window, soft_cap, scale = given.window, given.soft_cap, given.scale
    if window is not None and window < 1:
        problems.append(
            f"window is {window}; it counts the keys that a query sees, its own included: "
            "give 1 or more, or None"
        )
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        problems.append(f"soft_cap is {soft_cap}; it must be finite and > 0: give None for no cap")
    if scale is not None and not math.isfinite(scale):
        problems.append(f"scale is {scale}; it must be finite: give None for 1 / sqrt(head_dim)")
    batch, q_len, heads, _ = given.q.shape
    bias, slopes = given.bias, given.alibi_slopes
    if bias is not None:
        allowed = [{1, batch}, {1, heads}, {q_len}, {given.k.shape[1]}]
        if bias.ndim != 4 or any(n not in a for n, a in zip(bias.shape, allowed, strict=True)):
            problems.append(
                f"bias has shape {bias.shape}; it must be [batch or 1, heads or 1, q_len, kv_len]: "
                f"[{batch} or 1, {heads} or 1, {q_len}, {given.k.shape[1]}]"
            )
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            problems.append(
                f"bias is {bias.dtype}; it must be floating: for a mask, 0 where a key is seen "
                "and -inf where it is not"
            )
    if slopes is not None and (
        slopes.shape not in ((heads,), (batch, heads))
        or not jnp.issubdtype(slopes.dtype, jnp.floating)
    ):
        problems.append(
            f"alibi_slopes is {slopes.dtype}{list(slopes.shape)}; it must be floating [heads] or "
            f"[batch, heads]: [{heads}] or [{batch}, {heads}]"
        )
    return problems


def _offset_problems(given: Arguments) -> list[str]:
    offset = given.q_offset
    if isinstance(offset, int) or (
        offset.shape in ((), (given.q.shape[0],)) and jnp.issubdtype(offset.dtype, jnp.integer)
    ):
        return []
    return [
        f"q_offset is {offset.dtype}{list(offset.shape)}; it must be an int, an int32 scalar, or "
        f"one int32 for each batch row: [{given.q.shape[0]}]"
    ]


def _dropout_problems(given: Arguments) -> list[str]:
    problems = []
    rate, key = given.dropout_rate, given.dropout_key
    if not 0 <= rate < 1:
        problems.append(f"dropout_rate is {rate}; it must be at least 0 and below 1")
    if rate > 0 and key is None:
        problems.append(
            f"dropout_rate is {rate} and dropout_key is missing; give a key from jax.random.key, "
            "or dropout_rate=0.0"
        )
    return problems


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))
