"""Attention whose batch and heads are spread over a mesh: each device computes its own, alone.

Under plain `jit` the compiler gathers the operands of a kernel that it cannot look into onto every
device; here each device is given its own rows and heads.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from tjx_kernels.arguments import Arguments
from tjx_kernels.attention import IMPLEMENTATIONS, Options, choose, dead_rows, implementations_for
from tjx_kernels.attention_call import AttentionCall, Forward, Operands

type Axes = str | tuple[str, ...]


@overload
def sharded_flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh | AbstractMesh,
    batch_axes: Axes = ...,
    head_axes: Axes = ...,
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
    return_lse: bool = False,
    **options: Unpack[Options],
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Run `flash_attention` with batch and heads spread over a mesh, without communication.

    Arguments and results are the whole arrays, as in `flash_attention`. Inputs that are sharded
    otherwise are moved first, or, along explicit axes of the mesh, refused by `jax.shard_map`.
    Where there are fewer key heads than places along `head_axes`, each place takes from the whole
    k and v the one head that its queries see, and the backward pass sums the gradients of that
    head over its places, in float32.

    Parameters
    ----------
    q, k, v, return_lse, options
        As in `flash_attention`.
    mesh
        The mesh to spread over.
    batch_axes, head_axes
        The axis of the mesh, or axes, over which the batch and the heads are spread; they divide
        them. Over the mesh's other axes all is repeated.

    Returns
    -------
    out : [batch, q_len, heads, head_dim]
        Spread as q is.
    lse : [batch, heads, q_len], only with `return_lse`
        Spread likewise.

    Raises
    ------
    ValueError
        As `flash_attention` does; for axes that the mesh has not, and sizes that do not divide.

    Notes
    -----
    Dropout draws for each batch row on its own, so that spreading the batch changes nothing. Where
    heads are spread, other weights are dropped than without a mesh, in each head still others.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import AxisType
    >>> mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    >>> q = kv = jnp.ones((2, 8, 4, 16))
    >>> sharded_flash_attention(
    ...     q, kv, kv, mesh=mesh, batch_axes="data", head_axes="tensor", causal=True).shape
    (2, 8, 4, 16)
    """
    given: dict[str, Any] = dict(options)
    implementation = given.pop("implementation", None)
    arguments = Arguments(q=q, k=k, v=v, return_lse=return_lse, **given)
    call = arguments.describe()
    batch_axes, head_axes = _names(batch_axes), _names(head_axes)
    _check_axes(mesh, batch_axes, head_axes)
    rows, places = (math.prod(mesh.shape[a] for a in axes) for axes in (batch_axes, head_axes))
    _check_sizes(call, (rows, batch_axes), (places, head_axes))
    # Key heads that do not suffice for all places stay whole, and each place picks one.
    shared = call.kv_heads < places
    local = replace(
        call,
        batch=call.batch // rows,
        heads=call.heads // places,
        kv_heads=1 if shared else call.kv_heads // places,
    )
    if call.bias is not None:
        local = replace(
            local, bias=(min(call.bias[0], local.batch), min(call.bias[1], local.heads))
        )
    run = IMPLEMENTATIONS[choose(implementation, implementations_for(local))].run
    if call.nothing_to_see:
        out, lse = dead_rows(call)
        return (out, lse) if return_lse else out

    operands = arguments.operands(call)
    specs = _specs(operands, batch_axes, head_axes, shared)
    if shared:
        # So that the sum over places in the backward pass is one of float32 numbers.
        wide = {name: x.astype(call.accumulator) for name, x in (("k", k), ("v", v))}
        operands = operands._replace(**wide)
    spread = jax.shard_map(
        partial(_on_one_device, run, local, places, head_axes),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(specs.q, _spec(batch_axes, head_axes)),
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    out, lse = spread(operands)
    return (out, lse) if return_lse else out


def _on_one_device(
    run: Forward, call: AttentionCall, places: int, head_axes: tuple[str, ...], operands: Operands
) -> tuple[jax.Array, jax.Array]:
    place = lax.axis_index(head_axes) if head_axes else 0
    if operands.k.shape[2] > call.kv_heads:
        # `places` is a multiple of the key heads: this many neighbours share one.
        head = place // (places // operands.k.shape[2])
        k, v = (
            lax.dynamic_slice_in_dim(x, head, 1, axis=2).astype(call.dtype)
            for x in (operands.k, operands.v)
        )
        operands = operands._replace(k=k, v=v)
    if operands.dropout_seed is not None:
        # Heads are numbered from 0 on each device: seeds of its own keep them apart.
        words = jnp.stack([jnp.uint32(0), jnp.asarray(place, jnp.uint32)])
        operands = operands._replace(dropout_seed=operands.dropout_seed ^ words[None, :])
    return run(call, operands)


def _specs(operands: Operands, batch: tuple[str, ...], heads: tuple[str, ...], shared: bool) -> Any:
    """Say over which axes each operand is spread, None for those that are not given."""
    kv_heads = () if shared else heads
    bias = None
    if operands.bias is not None:
        # What is of size 1 along batch or heads holds for all of them.
        bias = [
            axes if size > 1 else ()
            for size, axes in zip(operands.bias.shape[:2], (batch, heads), strict=True)
        ]
    spread: dict[str, Any] = {
        "q": (batch, None, heads),
        "k": (batch, None, kv_heads),
        "v": (batch, None, kv_heads),
        "bias": bias,
        "alibi_slopes": (batch, heads),
    }
    specs: dict[str, Any] = {
        name: None if x is None else _spec(*spread.get(name, (batch,)))
        for name, x in operands._asdict().items()
    }
    return Operands(**specs)


def _spec(*axes: tuple[str, ...] | None) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]  # as jax is


# --- checks ---------------------------------------------------------------------------------------


def _names(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _check_axes(
    mesh: Mesh | AbstractMesh, batch_axes: tuple[str, ...], head_axes: tuple[str, ...]
) -> None:
    problems = []
    for name, axes in (("batch_axes", batch_axes), ("head_axes", head_axes)):
        problems += [
            f"{name} names {axis!r}; the mesh has the axes {', '.join(map(repr, mesh.shape))}"
            for axis in axes
            if axis not in mesh.shape
        ]
    named = batch_axes + head_axes
    problems += [
        f"batch_axes and head_axes name {axis!r} {named.count(axis)} times; once is allowed"
        for axis in dict.fromkeys(named)
        if named.count(axis) > 1
    ]
    if problems:
        raise ValueError("\n".join(problems))


def _check_sizes(
    call: AttentionCall, rows: tuple[int, tuple[str, ...]], places: tuple[int, tuple[str, ...]]
) -> None:
    problems = [
        f"{name} is {size} and is spread over {count} places ({', '.join(axes)}); it must be a "
        "multiple of them"
        for name, size, (count, axes) in (
            ("batch", call.batch, rows),
            ("heads", call.heads, places),
        )
        if size % count
    ]
    count, axes = places
    if call.kv_heads % count and count % call.kv_heads:
        problems.append(
            f"kv_heads is {call.kv_heads} and is spread over {count} places ({', '.join(axes)}); "
            "one must be a multiple of the other"
        )
    if problems:
        raise ValueError("\n".join(problems))
