"""What is known of an attention call before it runs, and what an implementation has to offer.

`describe` checks a call's arguments and gives an `AttentionCall`: everything that is static,
hashable, so that an implementation can say from it alone whether it can serve, and be compiled
for it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

# Shapes and dtypes are all that a description needs: real arrays, tracers or specifications.
Shaped = jax.Array | jax.ShapeDtypeStruct

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The static part of one attention call.

    Attributes
    ----------
    batch, q_len, kv_len, heads, kv_heads, head_dim
        Sizes of q [batch, q_len, heads, head_dim] and k, v [batch, kv_len, kv_heads, head_dim].
    dtype
        Name of the dtype of q, k and v.
    causal, window, soft_cap, scale
        As given to `flash_attention`; `scale` is resolved.
    segment_ids
        Whether segment ids are given.
    q_offset
        Position of the first query, or None where it is known only when the program runs.
    platform
        What JAX runs on: "cpu", "gpu" or "tpu".
    """

    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    causal: bool
    window: int | None
    soft_cap: float | None
    scale: float
    segment_ids: bool
    q_offset: int | None
    platform: str

    @property
    def accumulator(self) -> jnp.dtype:
        """The dtype of scores, softmax and LSE: float32, for float64 inputs float64."""
        return jnp.promote_types(self.dtype, jnp.float32)


class Run(Protocol):
    """How an implementation is called: with arrays in the public layout, checked, not empty."""

    def __call__(
        self,
        call: AttentionCall,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        q_segment_ids: jax.Array | None,
        kv_segment_ids: jax.Array | None,
        q_offset: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return out [batch, q_len, heads, head_dim] and LSE [batch, heads, q_len]."""
        ...


class Implementation(NamedTuple):
    """One way to compute attention.

    `supports(call)` is None where it can serve, otherwise the reason why not, in words that
    complete "implementation X cannot serve this call: ...".
    """

    run: Run
    supports: Callable[[AttentionCall], str | None]


def describe(
    q: Shaped,
    k: Shaped,
    v: Shaped,
    *,
    causal: bool,
    q_segment_ids: Shaped | None,
    kv_segment_ids: Shaped | None,
    window: int | None,
    soft_cap: float | None,
    scale: float | None,
    q_offset: int | Shaped,
) -> AttentionCall:
    """Check a call and describe it.

    Raises
    ------
    ValueError
        With one line for each thing that is wrong.
    """
    # Ranks first: nothing else can be said of arrays that have no such axes.
    _raise_all(
        [
            f"{name} has shape {x.shape}; it must be [batch, length, heads, head_dim]"
            for name, x in (("q", q), ("k", k), ("v", v))
            if x.ndim != 4
        ]
    )
    batch, q_len, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    problems = _shape_problems(q, k, v)
    problems += _segment_problems(q, k, q_segment_ids, kv_segment_ids)
    if window is not None and window < 1:
        problems.append(
            f"window is {window}; it counts the keys that a query sees, its own included: "
            "give 1 or more, or None"
        )
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        problems.append(f"soft_cap is {soft_cap}; it must be finite and > 0: give None for no cap")
    if scale is not None and not math.isfinite(scale):
        problems.append(f"scale is {scale}; it must be finite: give None for 1 / sqrt(head_dim)")
    if not isinstance(q_offset, int) and (
        q_offset.shape != () or not jnp.issubdtype(q_offset.dtype, jnp.integer)
    ):
        problems.append(
            f"q_offset is {q_offset.dtype}{list(q_offset.shape)}; it must be one integer: "
            "give an int or an int32 scalar"
        )
    _raise_all(problems)
    return AttentionCall(
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=jnp.dtype(q.dtype).name,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        scale=head_dim**-0.5 if scale is None else float(scale),
        segment_ids=q_segment_ids is not None,
        q_offset=q_offset if isinstance(q_offset, int) else None,
        platform=jax.default_backend(),
    )


def _shape_problems(
    q: Shaped,
    k: Shaped,
    v: Shaped,
) -> list[str]:
    problems = []
    heads, kv_heads = q.shape[2], k.shape[2]
    if k.shape != v.shape:
        problems.append(f"k has shape {k.shape} and v {v.shape}; they must be the same")
    if k.shape[0] != q.shape[0]:
        problems.append(f"q has batch {q.shape[0]} and k {k.shape[0]}; they must be the same")
    if k.shape[3] != q.shape[3]:
        problems.append(f"q has head_dim {q.shape[3]} and k {k.shape[3]}; they must be the same")
    if q.shape[3] < 1:
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
    q: Shaped,
    k: Shaped,
    q_segment_ids: Shaped | None,
    kv_segment_ids: Shaped | None,
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


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))
