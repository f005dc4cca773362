"""Attention calls of the compile report, the same for every kernel."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class Case:
    """One call of `flash_attention`, forward and backward.

    Attributes
    ----------
    name
        Unique name in the report.
    head_dim, dtype, q_len, kv_len
        As in the call. Lengths that are no multiple of a block exercise the masks of the ends.
    options
        Static options of `flash_attention`.
    arrays
        Names of the optional arrays of the call.
    """

    name: str
    head_dim: int
    dtype: str = "bfloat16"
    q_len: int = 2048
    kv_len: int = 2048
    options: dict[str, Any] = field(default_factory=dict)
    arrays: tuple[str, ...] = ()


def prefix_and_blocks(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """Mask by every index: diagonal blocks for some heads, a prefix that batch rows differ in."""
    blocks = (query // 256 == key // 256) & (head % 2 == 0)
    return blocks | (key < 64 * (1 + batch))


def cases() -> list[Case]:
    """Return all cases, the most important first."""
    plain = [
        Case(f"D{dim} {'causal' if causal else 'full'}", dim, options={"causal": causal})
        for dim in HEAD_DIMS
        for causal in (True, False)
    ]
    segments = ("q_segment_ids", "kv_segment_ids")
    packed: dict[str, Any] = {"causal": True, "window": 512, "soft_cap": 30.0}
    causal: dict[str, Any] = {"causal": True}
    other = [
        case
        for dim in (64, 128)
        for case in (
            Case(f"D{dim} segments, window, soft cap", dim, options=packed, arrays=segments),
            Case(f"D{dim} odd lengths, offset", dim, "bfloat16", 1001, 777, causal, ("q_offset",)),
            Case(f"D{dim} bias, alibi", dim, options=causal, arrays=("bias", "alibi_slopes")),
            Case(f"D{dim} float32", dim, "float32", options=causal),
            Case(f"D{dim} mask function", dim, options={"mask": prefix_and_blocks}),
        )
    ]
    return [
        *plain,
        *other,
        Case("D256 float32", 256, "float32", options=causal),
        Case("D128 float16", 128, "float16", options=causal),
        Case("D64 dropout", 64, options={**causal, "dropout_rate": 0.1}, arrays=("dropout_key",)),
    ]


def shapes(
    case: Case, sharding: jax.sharding.Sharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the array types of a case: batch 2, 8 query heads, 4 key heads."""
    batch, heads, kv_heads = 2, 8, 4
    q = (batch, case.q_len, heads, case.head_dim)
    kv = (batch, case.kv_len, kv_heads, case.head_dim)
    key = jax.eval_shape(lambda: jax.random.key(0))
    every: dict[str, tuple[tuple[int, ...], Any]] = {
        "q": (q, case.dtype),
        "k": (kv, case.dtype),
        "v": (kv, case.dtype),
        "dout": (q, case.dtype),
        "dlse": ((batch, heads, case.q_len), "float32"),
        "q_segment_ids": (q[:2], "int32"),
        "kv_segment_ids": (kv[:2], "int32"),
        "q_offset": ((batch,), "int32"),
        "bias": ((1, heads, case.q_len, case.kv_len), case.dtype),
        "alibi_slopes": ((heads,), "float32"),
        "dropout_key": (key.shape, key.dtype),
    }
    chosen = ("q", "k", "v", "dout", "dlse", *case.arrays)
    return {
        name: jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]  # as jax is
            shape, _dtype(dtype), sharding=sharding
        )
        for name, (shape, dtype) in every.items()
        if name in chosen
    }


def _dtype(dtype: Any) -> Any:
    return jnp.dtype(dtype) if isinstance(dtype, str) else dtype
