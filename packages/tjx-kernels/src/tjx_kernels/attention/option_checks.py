"""Checks of the optional arrays of an attention call and of its dropout.

Each function yields one line for each problem. `call.describe_call` calls it for given options.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

# Arrays, tracers or their specifications: the checks read shapes and dtypes only.
Shaped = jax.Array | jax.ShapeDtypeStruct


def segment_problems(
    q: Shaped, k: Shaped, q_segment_ids: Shaped | None, kv_segment_ids: Shaped | None
) -> Iterator[str]:
    """Yield the problems of segment ids, of which at least one array is given."""
    if q_segment_ids is None or kv_segment_ids is None:
        given, missing = "kv_segment_ids", "q_segment_ids"
        if kv_segment_ids is None:
            given, missing = missing, given
        yield f"{missing}: got None with {given}; expected both or neither; give both"
        return
    for name, ids, x in (
        ("q_segment_ids", q_segment_ids, q),
        ("kv_segment_ids", kv_segment_ids, k),
    ):
        if ids.shape != x.shape[:2]:
            yield (
                f"{name}: got shape {ids.shape}; expected [batch, length] {x.shape[:2]}; reshape it"
            )
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            yield f"{name}: got {ids.dtype}; expected integers; cast it to int32"


def bias_problems(q: Shaped, k: Shaped, bias: Shaped) -> Iterator[str]:
    """Yield the problems of a bias of the scores."""
    batch, q_len, heads, _ = q.shape
    allowed = [{1, batch}, {1, heads}, {q_len}, {k.shape[1]}]
    if bias.ndim != 4 or any(n not in a for n, a in zip(bias.shape, allowed, strict=True)):
        yield (
            f"bias: got shape {bias.shape}; expected [batch or 1, heads or 1, q_len, kv_len], "
            f"[{batch} or 1, {heads} or 1, {q_len}, {k.shape[1]}]; reshape it"
        )
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        yield (
            f"bias: got {bias.dtype}; expected a floating dtype; for a boolean mask give "
            "jnp.where(mask, 0.0, -jnp.inf)"
        )


def slope_problems(q: Shaped, slopes: Shaped) -> Iterator[str]:
    """Yield the problems of ALiBi slopes."""
    batch, _, heads, _ = q.shape
    if slopes.shape not in ((heads,), (batch, heads)) or not jnp.issubdtype(
        slopes.dtype, jnp.floating
    ):
        yield (
            f"alibi_slopes: got {slopes.dtype}{list(slopes.shape)}; expected floating [heads] or "
            f"[batch, heads], [{heads}] or [{batch}, {heads}]; reshape or cast it"
        )


def sink_problems(q: Shaped, sinks: Shaped) -> Iterator[str]:
    """Yield the problems of attention sinks."""
    heads = q.shape[2]
    if sinks.shape != (heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        yield (
            f"sinks: got {sinks.dtype}{list(sinks.shape)}; expected floating [heads], [{heads}]; "
            "reshape or cast it"
        )


def offset_problems(q: Shaped, offset: Shaped) -> Iterator[str]:
    """Yield the problems of an array of positions of the first query."""
    if offset.shape not in ((), (q.shape[0],)) or not jnp.issubdtype(offset.dtype, jnp.integer):
        yield (
            f"q_offset: got {offset.dtype}{list(offset.shape)}; expected an int, an int32 scalar "
            f"or int32 [batch], [{q.shape[0]}]; reshape or cast it"
        )


def dropout_problems(rate: float, key: Any) -> Iterator[str]:
    """Yield the problems of a dropout rate other than 0 and of its key."""
    if not 0 <= rate < 1:
        yield f"dropout_rate: got {rate}; expected 0 <= rate < 1; correct it"
    if rate > 0 and key is None:
        yield (
            f"dropout_key: got None with dropout_rate {rate}; expected a PRNG key; give "
            "jax.random.key(seed), or dropout_rate=0.0"
        )
