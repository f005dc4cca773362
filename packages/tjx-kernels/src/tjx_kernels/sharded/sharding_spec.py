"""Sharding of an attention call over mesh axes: validation, partition specs and local shapes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from tjx_kernels.attention.call import AttentionCall, Operands
from tjx_kernels.attention.mask_functions import mask_sizes
from tjx_kernels.sharded.ring_schedule import Order

type Axes = str | tuple[str, ...]
type Context = Literal["ring", "all_to_all"]


@dataclass(frozen=True)
class AttentionSharding:
    """Mesh axes that shard the batch, heads and tokens of an attention call.

    Attributes
    ----------
    mesh
        The mesh of the enclosing `jax.shard_map`, if any, else the given one.
    batch, heads, seq
        Names of mesh axes.
    context, order
        Context parallelism (ring or all-to-all) and order of the tokens in the sequence.
    """

    mesh: Mesh | AbstractMesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    seq: tuple[str, ...]
    context: Context
    order: Order

    def axis_size(self, axes: tuple[str, ...]) -> int:
        """Return the number of devices along mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def seq_shards(self) -> int:
        """Number of shards of the sequence."""
        return self.axis_size(self.seq)

    @property
    def uses_all_to_all(self) -> bool:
        """Whether an all-to-all exchanges heads for tokens."""
        return self.seq_shards > 1 and self.context == "all_to_all"

    def shares_keys(self, call: AttentionCall) -> bool:
        """Whether there are fewer key heads than shards of heads, so that devices share them."""
        return call.kv_heads < self.axis_size(self.heads)

    def local_call(self, call: AttentionCall) -> AttentionCall:
        """Return the call of one device's shard."""
        head_shards = self.axis_size(self.heads)
        local = replace(
            call,
            batch=call.batch // self.axis_size(self.batch),
            q_len=call.q_len // self.seq_shards,
            kv_len=call.kv_len // self.seq_shards,
            heads=call.heads // head_shards,
            kv_heads=1 if self.shares_keys(call) else call.kv_heads // head_shards,
        )
        if call.bias is not None:
            bias = (min(call.bias[0], local.batch), min(call.bias[1], local.heads))
            local = replace(local, bias=bias)
        return local

    def specs(self, call: AttentionCall, operands: Operands) -> Any:
        """Return the partition spec of each operand, None for absent ones."""
        # Bias and slopes are sharded as their heads are after the all-to-all.
        exchanged = self.heads + self.seq if self.uses_all_to_all else self.heads
        kv = _spec(self.batch, self.seq, () if self.shares_keys(call) else self.heads)
        tokens = _spec(self.batch, self.seq)
        bias = None
        if operands.bias is not None:
            # An axis of size 1 broadcasts: replicate it.
            over = zip(operands.bias.shape[:2], (self.batch, exchanged), strict=True)
            bias = _spec(*(axes if size > 1 else () for size, axes in over))
        specs: dict[str, Any] = {
            "q": _spec(self.batch, self.seq, self.heads),
            "k": kv,
            "v": kv,
            "q_segment_ids": tokens,
            "kv_segment_ids": tokens,
            "bias": bias,
            "alibi_slopes": _spec(self.batch, exchanged),
        }
        given: dict[str, Any] = {
            name: None if x is None else specs.get(name, _spec(self.batch))
            for name, x in operands._asdict().items()
        }
        return Operands(**given)

    def output_specs(self) -> tuple[PartitionSpec, PartitionSpec]:
        """Return the partition specs of the output and the log-sum-exp."""
        return _spec(self.batch, self.seq, self.heads), _spec(self.batch, self.heads, self.seq)


def _spec(*axes: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(names or None for names in axes))  # type: ignore[no-untyped-call]  # as jax is


def make_attention_sharding(
    mesh: Mesh | AbstractMesh,
    *,
    batch_axes: Axes,
    head_axes: Axes,
    seq_axes: Axes,
    context: Context,
    order: Order,
) -> AttentionSharding:
    """Validate the mesh axes of a sharded attention call.

    Inside a `jax.shard_map` the axes refer to its mesh and must not be manual already.

    Raises
    ------
    ValueError
        With one line for each invalid argument.
    """
    for name, given, allowed in (("context", context, Context), ("order", order, Order)):
        if given not in get_args(allowed.__value__):
            choices = ", ".join(map(repr, get_args(allowed.__value__)))
            raise ValueError(f"{name}: got {given!r}; expected one of {choices}; correct it")
    here = jax.sharding.get_abstract_mesh()
    if here.manual_axes and dict(here.shape) != dict(mesh.shape):
        raise ValueError(
            f"mesh: got {dict(mesh.shape)}; expected that of the enclosing shard_map, "
            f"{dict(here.shape)}; give the same mesh"
        )
    batch, heads, seq = (
        (axes,) if isinstance(axes, str) else tuple(axes)
        for axes in (batch_axes, head_axes, seq_axes)
    )
    named = {"batch_axes": batch, "head_axes": heads, "seq_axes": seq}
    problems = []
    for name, axes in named.items():
        for axis in axes:
            if axis not in mesh.shape:
                among = ", ".join(map(repr, mesh.shape))
                problems.append(f"{name}: got {axis!r}; expected a mesh axis, {among}; correct it")
            elif axis in here.manual_axes:
                problems.append(
                    f"{name}: got {axis!r}; expected an axis that the enclosing shard_map has not "
                    "made manual; leave it out"
                )
    every = batch + heads + seq
    problems += [
        f"{', '.join(named)}: got {axis!r} {every.count(axis)} times; expected each axis once; "
        "leave it out of the others"
        for axis in dict.fromkeys(every)
        if every.count(axis) > 1
    ]
    _raise_all(problems)
    return AttentionSharding(here if here.manual_axes else mesh, batch, heads, seq, context, order)


def check_call(spread: AttentionSharding, call: AttentionCall) -> None:
    """Check that the sizes and options of a call fit its sharding.

    Raises
    ------
    ValueError
        With one line for each invalid argument.
    """
    problems = list(_size_problems(spread, call))
    if spread.uses_all_to_all and spread.order != "contiguous":
        problems.append(
            f'order: got {spread.order!r} with context "all_to_all"; expected "contiguous", as '
            'all-to-all balances the load already; give order="contiguous", or context="ring"'
        )
    if call.mask is not None:
        problems += _mask_problems(spread, call)
    if spread.seq_shards > 1 and spread.context == "ring":
        problems += [
            f'context: got "ring", which has no {what}; expected a call without; give '
            'context="all_to_all", or leave it out'
            for what, given in (
                (f"dropout (dropout_rate is {call.dropout_rate})", call.dropout_rate > 0),
                ("bias", call.bias is not None),
                ("mask function", call.mask is not None),
                ("alibi_slopes", call.alibi),
                ("q_offset", call.q_offset != 0),
            )
            if given
        ]
        if call.q_len != call.kv_len and (call.causal or call.window is not None):
            problems.append(
                f'context: got "ring" with {call.q_len} queries and {call.kv_len} keys; expected '
                "the same tokens under a causal mask or a window; give "
                'context="all_to_all"'
            )
    _raise_all(problems)


def _mask_problems(spread: AttentionSharding, call: AttentionCall) -> Iterator[str]:
    """Yield the sharded indices that a mask function reads: on a device they start at 0."""
    assert call.mask is not None
    heads = spread.heads + (spread.seq if spread.uses_all_to_all else ())
    sizes = mask_sizes(call.mask, 2, 2)
    for name, size, axes in zip(("batch", "head"), sizes, (spread.batch, heads), strict=True):
        if size > 1 and spread.axis_size(axes) > 1:
            yield (
                f"mask: got a function of the {name} index, which {', '.join(axes)} shard; "
                "expected a function of query positions and key indices; give the mask as an array"
            )


def _size_problems(spread: AttentionSharding, call: AttentionCall) -> Iterator[str]:
    ring, pad = ', or give context="ring"' if spread.uses_all_to_all else "", "; pad the sequence"
    for name, size, axes, advice in (
        ("batch", call.batch, spread.batch, ""),
        ("heads", call.heads, spread.heads + (spread.seq if spread.uses_all_to_all else ()), ring),
        ("q_len", call.q_len, spread.seq, pad),
        ("kv_len", call.kv_len, spread.seq, pad),
    ):
        if size % spread.axis_size(axes):
            yield (
                f"{name}: got {size}; expected a multiple of the {spread.axis_size(axes)} devices "
                f"along {', '.join(axes)}; correct the size or the mesh{advice}"
            )
    shards = spread.axis_size(spread.heads)
    if call.kv_heads % shards and shards % call.kv_heads:
        yield (
            f"kv_heads: got {call.kv_heads} with {shards} devices along "
            f"{', '.join(spread.heads)}; expected a multiple or a divisor; change one of them"
        )


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))
