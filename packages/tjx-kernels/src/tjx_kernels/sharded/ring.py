"""Ring attention over a sequence sharded over devices: the public function and its checks.

`ring_passes` implements the forward and backward pass, `ring_schedule` the token order and the
blocks that each device computes.
"""

from typing import Literal, TypedDict, Unpack, get_args, overload

import jax
from jax import lax

from tjx_kernels.attention.api import dead_rows, select_backend
from tjx_kernels.attention.backend import AttentionBackend, Forward
from tjx_kernels.attention.call import AttentionCall, bind_arguments
from tjx_kernels.sharded.ring_passes import Ring, attention_over, block_call
from tjx_kernels.sharded.ring_schedule import Order, schedule


class RingOptions(TypedDict, total=False):
    """Keyword arguments of `ring_attention`, without `axis_name` and `return_lse`."""

    order: Order
    causal: bool
    q_segment_ids: jax.Array | None
    kv_segment_ids: jax.Array | None
    window: int | None
    symmetric_window: bool
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
    symmetric_window: bool = False,
    soft_cap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Compute attention over a sequence sharded over devices; inside `jax.shard_map`.

    The result is that of `flash_attention` on the global sequence (Liu et al., "Ring Attention with
    Blockwise Transformers for Near-Infinite Context", 2023). A device sends keys and values to the
    next one before it computes with them, so communication and computation overlap. Masked blocks
    are skipped; with a causal window in contiguous order, keys rotate only as far as it reaches.

    Parameters
    ----------
    q : [batch, q_len, heads, head_dim]
        Queries of this device; q_len is the same on all devices, and equal to kv_len under a causal
        mask or a window.
    k, v : [batch, kv_len, kv_heads, head_dim]
        Keys and values of this device, as in `flash_attention`.
    axis_name
        Mesh axis, or axes, that shard the sequence.
    order
        "zigzag": the sequence was permuted with `zigzag` before sharding, which balances the load
        under a causal mask. "contiguous": device r holds the r-th part; faster with a causal window
        much shorter than the sequence, and equivalent without a causal mask.
    causal, window, symmetric_window, soft_cap, scale, return_lse, interpret
        As in `flash_attention`; positions refer to the global sequence.
    q_segment_ids, kv_segment_ids : integers [batch, q_len], [batch, kv_len]
        Segment ids of this device's tokens; both or neither.
    implementation
        Backend of `flash_attention` that runs on each device; None selects the first that supports
        all blocks of this call.

    Returns
    -------
    out : [batch, q_len, heads, head_dim]
        Rows of this device in q's dtype; partial results are merged in float32.
    lse : [batch, heads, q_len], only with `return_lse`
        As in `flash_attention`, over the keys of all devices; differentiable.

    Raises
    ------
    ValueError
        As `flash_attention`, and outside a `shard_map` over `axis_name`.

    Notes
    -----
    `jax.shard_map` needs `check_vma=False`: kernels do not declare over which axes their results
    vary. Output and LSE have the checkpoint names of `flash_attention`.

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
        return_lse=return_lse,
        interpret=interpret,
    )
    run = ring_over(call, axis_name, _axis_size(axis_name), order, implementation)
    out, lse = dead_rows(call) if call.is_empty else run(call, operands)
    return (out, lse) if return_lse else out


def ring_over(
    call: AttentionCall,
    axis_name: str | tuple[str, ...],
    size: int,
    order: Order,
    implementation: str | None,
) -> Forward:
    """Check the call of one of `size` devices and return its attention function."""
    _check(call, order)
    plan = schedule(call, order, size)
    calls = dict.fromkeys(block_call(call, block) for case in plan.cases for block in case)

    def supports(entry: AttentionBackend) -> str | None:
        if entry.backward is None:
            return "a ring needs a backward pass that takes the LSE of whole rows"
        return next(filter(None, map(entry.supports, calls)), None)

    return attention_over(
        Ring(axis_name, size, order, select_backend(implementation, call, supports))
    )


def _check(call: AttentionCall, order: str) -> None:
    orders = get_args(Order.__value__)
    if order not in orders:
        raise ValueError(f"order: got {order!r}; expected one of {', '.join(orders)}; correct it")
    if not call.causal and call.window is None:
        return
    if call.q_len != call.kv_len:
        raise ValueError(
            f"k: got a shard of {call.kv_len} keys with {call.q_len} queries; expected the same "
            "part of one sequence under a causal mask or a window; shard them alike"
        )
    if order == "zigzag" and call.q_len % 2:
        raise ValueError(
            f"q: got a shard of {call.q_len} tokens; expected an even number in zigzag order, two "
            'chunks of one length; pad the sequence, or give order="contiguous"'
        )


def _axis_size(axis_name: str | tuple[str, ...]) -> int:
    try:
        return int(lax.axis_size(axis_name))
    except NameError as error:
        raise ValueError(
            f"axis_name: got {axis_name!r}, which no enclosing jax.shard_map has; expected a "
            "manual mesh axis; call ring_attention within a shard_map over that axis"
        ) from error
