"""Attention whose batch, heads and tokens are spread over a mesh: the one call for any mesh.

Under plain `jit` the compiler gathers the operands of a kernel that it cannot look into onto every
device; here each device is given its own rows, heads and tokens. What fits is in `spread.py`, how
devices that share a sequence work together in `ring.py` and `exchange.py`.
"""

from functools import partial
from typing import Any, Literal, Unpack, overload

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from tjx_kernels.attention import dropout
from tjx_kernels.attention.api import Options, dead_rows, implementations_for, select
from tjx_kernels.attention.arguments import Arguments
from tjx_kernels.attention.types import AttentionCall, Forward, Operands
from tjx_kernels.sharded.all_to_all import exchanged_call, exchanging
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
    **options: Unpack[Options],
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
    **options: Unpack[Options],
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
    **options: Unpack[Options],
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Run `flash_attention` with batch, heads and tokens spread over a mesh.

    Arguments and results are the whole arrays, as in `flash_attention`. Inputs that are sharded
    otherwise are moved first, or, along explicit axes of the mesh, refused by `jax.shard_map`.
    Batch and heads need no communication. Where there are fewer key heads than places along
    `head_axes`, each place takes from the whole k and v the one head that its queries see, and the
    backward pass sums the gradients of that head over its places, in float32.

    Parameters
    ----------
    q, k, v, return_lse, options
        As in `flash_attention`.
    mesh
        The mesh to spread over. Within a `jax.shard_map` over some of its axes, as for pipeline
        stages, the others may be named.
    batch_axes, head_axes, seq_axes
        The axis of the mesh, or axes, over which the batch, the heads and the tokens (queries and
        keys) are spread; they divide them. Over the mesh's other axes all is repeated.
    context
        How devices attend to each other's tokens, where `seq_axes` has more than one place. "ring":
        keys travel, see `ring_attention`; for any number of heads, without dropout, bias, ALiBi
        slopes and q_offset. "all_to_all": heads are exchanged for tokens, each device computes
        whole sequences for fewer heads, and the result is exchanged back (Jacobs et al., "DeepSpeed
        Ulysses", 2023); with everything that `flash_attention` has. The places along `head_axes`
        and `seq_axes` together must divide the heads; key heads are repeated as often as needed.
    order
        The order in which the tokens stand. "zigzag", for the ring alone: the whole sequence was
        reordered with `zigzag(x, places)`, which gives each device the same amount of work under a
        causal mask.

    Returns
    -------
    out : [batch, q_len, heads, head_dim]
        Spread, and in the order, as q is.
    lse : [batch, heads, q_len], only with `return_lse`
        Likewise.

    Raises
    ------
    ValueError
        As `flash_attention` does; for axes that the mesh has not, or that are spread over already;
        for sizes that do not divide, and for what the ring does not have.

    Notes
    -----
    Dropout drops the same weights on every mesh: those that `flash_attention` drops.

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
    arguments = Arguments(q=q, k=k, v=v, return_lse=return_lse, **given)
    call = arguments.describe()
    spread = make_attention_sharding(
        mesh,
        batch_axes=batch_axes,
        head_axes=head_axes,
        seq_axes=seq_axes,
        context=context,
        order=order,
    )
    check_call(spread, call)
    run = _together(spread, spread.at_a_place(call), implementation)
    if call.nothing_to_see:
        out, lse = dead_rows(call)
        return (out, lse) if return_lse else out

    operands = arguments.operands(call)
    specs = spread.specs(call, operands)
    if spread.shares_keys(call):
        # So that the sum over places in the backward pass is one of float32 numbers.
        wide = {name: x.astype(call.accumulator) for name, x in (("k", k), ("v", v))}
        operands = operands._replace(**wide)
    out, lse = jax.shard_map(
        partial(_at_a_place, run, call, spread),
        mesh=spread.mesh,
        in_specs=(specs,),
        out_specs=spread.of_results(),
        check_vma=False,  # kernels do not say over which axes their results vary
    )(operands)
    return (out, lse) if return_lse else out


def _together(
    spread: AttentionSharding, local: AttentionCall, implementation: str | None
) -> Forward:
    """Give the function that computes what one place holds, with those that share its tokens."""
    if spread.parts > 1 and spread.context == "ring":
        return ring_over(local, spread.seq, spread.parts, spread.order, implementation)
    alone = exchanged_call(local, spread.parts) if spread.exchanges else local
    run = select(implementation, implementations_for(alone), alone).run
    return exchanging(run, spread.seq, spread.parts) if spread.exchanges else run


def _at_a_place(
    run: Forward, call: AttentionCall, spread: AttentionSharding, operands: Operands
) -> tuple[jax.Array, jax.Array]:
    local = spread.at_a_place(call)
    place = lax.axis_index(spread.heads) if spread.heads else 0
    if spread.shares_keys(call):
        # The places are a multiple of the key heads: this many neighbours share one.
        head = place // (spread.places(spread.heads) // call.kv_heads)
        k, v = (
            lax.dynamic_slice_in_dim(x, head, 1, axis=2).astype(call.dtype)
            for x in (operands.k, operands.v)
        )
        operands = operands._replace(k=k, v=v)
    if operands.dropout_seed is not None:
        # Heads are numbered from 0 at each place.
        seed = dropout.from_head(operands.dropout_seed, place * local.heads)
        operands = operands._replace(dropout_seed=seed)
    return run(local, operands)
