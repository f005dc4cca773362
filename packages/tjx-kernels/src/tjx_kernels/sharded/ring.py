"""Attention over a sequence that is spread over devices: the public function and its checks.

What is computed and sent is in `ring_passes.py`, who sees what in `ring_schedule.py`.
"""

from typing import Literal, TypedDict, Unpack, get_args, overload

import jax
from jax import lax

from tjx_kernels.attention.api import BACKENDS, dead_rows, select
from tjx_kernels.attention.arguments import Arguments
from tjx_kernels.attention.types import AttentionBackend, AttentionCall, Forward
from tjx_kernels.sharded.ring_passes import Ring, attention_over, part_call
from tjx_kernels.sharded.ring_schedule import Order, Schedule, schedule


class RingOptions(TypedDict, total=False):
    """The keyword arguments of `ring_attention` that change what is computed, or how."""

    order: Order
    causal: bool
    q_segment_ids: jax.Array | None
    kv_segment_ids: jax.Array | None
    window: int | None
    soft_cap: float | None
    scale: float | None
    implementation: str | None
    interpret: bool


@overload
def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
    return_lse: Literal[False] = ...,
    **options: Unpack[RingOptions],
) -> jax.Array: ...


@overload
def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
    return_lse: Literal[True],
    **options: Unpack[RingOptions],
) -> tuple[jax.Array, jax.Array]: ...


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
    order: Order = "zigzag",
    causal: bool = False,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of a whole sequence, of which each device holds a part; within `jax.shard_map`.

    The result is what `flash_attention` gives for the whole sequence (Liu et al., "Ring Attention
    with Blockwise Transformers for Near-Infinite Context", 2023). A device sends its keys on
    before it computes with them, so that the two overlap. Parts that nobody sees are not computed;
    with a causal window in contiguous order, keys travel no farther than the window reaches.

    Parameters
    ----------
    q : [batch, q_len, heads, head_dim]
        This device's queries. Under a causal mask or a window q_len is kv_len, and the same on all
        devices in any case.
    k, v : [batch, kv_len, kv_heads, head_dim]
        This device's keys and values, as in `flash_attention`.
    axis_name
        The axis of the mesh, or axes, that the sequence is spread over.
    order
        "zigzag": the sequence was reordered with `zigzag` before it was sharded, which gives each
        device the same amount of work under a causal mask. "contiguous": device r holds the r-th
        part of it; better with a causal window that is short against the sequence, and the same
        without a causal mask.
    causal, window, soft_cap, scale, return_lse, interpret
        As in `flash_attention`; positions are those in the whole sequence.
    q_segment_ids, kv_segment_ids : integers [batch, q_len], [batch, kv_len]
        This device's part of them; both or neither.
    implementation
        The name of the implementation of `flash_attention` that computes on each device, or None
        for the first that supports all parts of this call.

    Returns
    -------
    out : [batch, q_len, heads, head_dim]
        This device's rows, in q's dtype; merged in float32.
    lse : [batch, heads, q_len], only with `return_lse`
        As in `flash_attention`, over the keys of all devices; differentiable.

    Raises
    ------
    ValueError
        As `flash_attention` does, and outside a `shard_map` that has the axis.

    Notes
    -----
    `jax.shard_map` needs `check_vma=False`: kernels do not say over which axes their results vary.
    Output and LSE carry the names that those of `flash_attention` carry.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import PartitionSpec as P
    >>> from tjx_kernels.sharded.ring_schedule import unzigzag, zigzag
    >>> mesh = jax.make_mesh((1,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> q = kv = zigzag(jnp.ones((2, 8, 4, 16)), 1)
    >>> run = jax.shard_map(
    ...     lambda q, kv: ring_attention(q, kv, kv, axis_name="context", causal=True),
    ...     mesh=mesh, in_specs=P(None, "context"), out_specs=P(None, "context"), check_vma=False)
    >>> unzigzag(run(q, kv), 1).shape
    (2, 8, 4, 16)
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
        return_lse=return_lse,
        interpret=interpret,
    )
    call = arguments.describe()
    run = ring_over(call, axis_name, _axis_size(axis_name), order, implementation)
    out, lse = dead_rows(call) if call.nothing_to_see else run(call, arguments.operands(call))
    return (out, lse) if return_lse else out


def ring_over(
    call: AttentionCall,
    axis_name: str | tuple[str, ...],
    size: int,
    order: Order,
    implementation: str | None,
) -> Forward:
    """Check a call of one of `size` devices, and give the function that computes it."""
    _check(call, order)
    reasons = _reasons(call, schedule(call, order, size))
    return attention_over(Ring(axis_name, size, order, select(implementation, reasons, call)))


def _check(call: AttentionCall, order: str) -> None:
    orders = get_args(Order.__value__)
    if order not in orders:
        raise ValueError(f"order is {order!r}; it must be one of {', '.join(orders)}")
    if not call.causal and call.window is None:
        return
    if call.q_len != call.kv_len:
        raise ValueError(
            f"a device holds {call.q_len} queries and {call.kv_len} keys; under a causal mask or a "
            "window they must be the same part of one sequence"
        )
    if order == "zigzag" and call.q_len % 2:
        raise ValueError(
            f"a device holds {call.q_len} tokens; in zigzag order it holds two chunks of one "
            'length: pad the sequence, or give order="contiguous"'
        )


def _axis_size(axis_name: str | tuple[str, ...]) -> int:
    try:
        return int(lax.axis_size(axis_name))
    except NameError as error:
        raise ValueError(
            f"axis_name is {axis_name!r}, which no enclosing jax.shard_map has; call "
            "ring_attention within a shard_map over a mesh with that axis"
        ) from error


def _reasons(call: AttentionCall, plan: Schedule) -> dict[str, str | None]:
    """Say for each implementation why it cannot serve in this ring, or None where it can."""
    calls = dict.fromkeys(part_call(call, part) for case in plan.cases for part in case)

    def reason(entry: AttentionBackend) -> str | None:
        if entry.backward is None:
            return "a ring needs a backward pass that takes the LSE of whole rows"
        return next(filter(None, map(entry.supports, calls)), None)

    return {name: reason(entry) for name, entry in BACKENDS.items()}
