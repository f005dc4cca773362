"""Attention with batch, heads and tokens sharded over a device mesh.

Under plain `jit` the compiler replicates the operands of an opaque kernel on every device; here
`jax.shard_map` gives each device its own rows, heads and tokens. `sharding_spec` validates the
sharding; `ring` and `all_to_all` implement context parallelism.
"""

from functools import partial
from typing import Any, Literal, Unpack, overload

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from tjx_kernels.attention import dropout
from tjx_kernels.attention.api import AttentionOptions, dead_rows, select_backend
from tjx_kernels.attention.backend import Forward
from tjx_kernels.attention.call import AttentionCall, Operands, bind_arguments
from tjx_kernels.attention.sinks import apply_sinks
from tjx_kernels.sharded.all_to_all import exchanged_call, with_all_to_all
from tjx_kernels.sharded.ring import ring_over
from tjx_kernels.sharded.ring_schedule import Order
from tjx_kernels.sharded.sharding_spec import (
    AttentionSharding,
    Axes,
    Context,
    check_call,
    make_attention_sharding,
)


@overload
def sharded_flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh | AbstractMesh,
    batch_axes: Axes = ...,
    head_axes: Axes = ...,
    seq_axes: Axes = ...,
    context: Context = ...,
    order: Order = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> jax.Array: ...


@overload
def sharded_flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh | AbstractMesh,
    batch_axes: Axes = ...,
    head_axes: Axes = ...,
    seq_axes: Axes = ...,
    context: Context = ...,
    order: Order = ...,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[jax.Array, jax.Array]: ...


def sharded_flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh | AbstractMesh,
    batch_axes: Axes = (),
    head_axes: Axes = (),
    seq_axes: Axes = (),
    context: Context = "ring",
    order: Order = "contiguous",
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Run `flash_attention` with batch, heads and tokens sharded over a mesh.

    Arguments and results are global arrays, as in `flash_attention`. Inputs with another sharding
    are resharded first, or, along explicit mesh axes, rejected by `jax.shard_map`. Sharding batch
    and heads needs no communication. With fewer key heads than devices along `head_axes`, each
    device slices its key head from replicated k and v, and the backward pass sums the gradients of
    a key head over its devices in float32.

    Parameters
    ----------
    q, k, v, return_lse, **options
        As in `flash_attention`. A mask function must not read indices that are sharded.
    mesh
        The device mesh. Inside a `jax.shard_map` over some of its axes, as for pipeline stages,
        the other axes may be used.
    batch_axes, head_axes, seq_axes
        Mesh axis, or axes, that shard the batch, the heads and the tokens (queries and keys); their
        sizes must divide them. All arrays are replicated over the other axes.
    context
        Context parallelism for `seq_axes` with more than one device. "ring": keys and values
        rotate, see `ring_attention`; any number of heads, but no dropout, bias, mask, ALiBi slopes
        or q_offset. "all_to_all": an all-to-all exchanges heads for tokens, each device computes
        whole sequences for fewer heads, and a second one restores the sharding (Jacobs et al.,
        "DeepSpeed Ulysses", 2023); supports all options. The product of the sizes of `head_axes`
        and `seq_axes` must divide the heads; key heads are repeated as needed.
    order
        Order of the tokens. "zigzag", for the ring only: the global sequence was permuted with
        `zigzag(x, axis_size)`, which balances the load under a causal mask.

    Returns
    -------
    out : [batch, q_len, heads, head_dim]
        Sharded and ordered as q.
    lse : [batch, heads, q_len], only with `return_lse`
        Sharded and ordered likewise.

    Raises
    ------
    ValueError
        As `flash_attention`; for unknown or already manual mesh axes, sizes that the axes do not
        divide, and options that the ring does not support.

    Notes
    -----
    Dropout masks are those of `flash_attention`, on every mesh.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import AxisType
    >>> names = ("data", "context", "tensor")
    >>> mesh = jax.make_mesh((1, 1, 1), names, axis_types=(AxisType.Auto,) * 3)
    >>> q = kv = jnp.ones((2, 8, 4, 16))
    >>> sharded_flash_attention(q, kv, kv, mesh=mesh, batch_axes="data", seq_axes="context",
    ...     head_axes="tensor", context="all_to_all", causal=True).shape
    (2, 8, 4, 16)
    """
    given: dict[str, Any] = dict(options)
    implementation = given.pop("implementation", None)
    call, operands = bind_arguments(q, k, v, return_lse=return_lse, **given)
    spread = make_attention_sharding(
        mesh,
        batch_axes=batch_axes,
        head_axes=head_axes,
        seq_axes=seq_axes,
        context=context,
        order=order,
    )
    check_call(spread, call)
    run = _local_attention(spread, spread.local_call(call), implementation)
    if call.is_empty:
        out, lse = dead_rows(call)
        return (out, lse) if return_lse else out

    specs = spread.specs(call, operands)
    if spread.shares_keys(call):
        # The backward pass then sums the gradients over devices in float32.
        wide = {name: x.astype(call.accumulator) for name, x in (("k", k), ("v", v))}
        operands = operands._replace(**wide)
    out, lse = jax.shard_map(
        partial(_attend_shard, run, call, spread),
        mesh=spread.mesh,
        in_specs=(specs,),
        out_specs=spread.output_specs(),
        check_vma=False,  # kernels do not declare over which axes their results vary
    )(operands)
    if (sinks := options.get("sinks")) is not None:
        out = apply_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def _local_attention(
    spread: AttentionSharding, local: AttentionCall, implementation: str | None
) -> Forward:
    """Return the attention function of one device's shard, with context parallelism if needed."""
    if spread.seq_shards > 1 and spread.context == "ring":
        return ring_over(local, spread.seq, spread.seq_shards, spread.order, implementation)
    if not spread.uses_all_to_all:
        return select_backend(implementation, local).run
    run = select_backend(implementation, exchanged_call(local, spread.seq_shards)).run
    return with_all_to_all(run, spread.seq, spread.seq_shards)


def _attend_shard(
    run: Forward, call: AttentionCall, spread: AttentionSharding, operands: Operands
) -> tuple[jax.Array, jax.Array]:
    local = spread.local_call(call)
    shard = lax.axis_index(spread.heads) if spread.heads else 0
    if spread.shares_keys(call):
        # The head shards are a multiple of the key heads: this many consecutive ones share one.
        head = shard // (spread.axis_size(spread.heads) // call.kv_heads)
        k, v = (
            lax.dynamic_slice_in_dim(x, head, 1, axis=2).astype(call.dtype)
            for x in (operands.k, operands.v)
        )
        operands = operands._replace(k=k, v=v)
    if operands.dropout_seed is not None:
        # The local call numbers its heads from 0.
        seed = dropout.from_head(operands.dropout_seed, shard * local.heads)
        operands = operands._replace(dropout_seed=seed)
    return run(local, operands)
