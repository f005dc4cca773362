"""Over which axes of a mesh attention is spread: what fits, and what each place is given."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from tjx_kernels.attention.types import AttentionCall, Operands
from tjx_kernels.sharded.ring_schedule import Order

type Axes = str | tuple[str, ...]
type Context = Literal["ring", "all_to_all"]


@dataclass(frozen=True)
class AttentionSharding:
    """The axes that batch, heads and tokens are spread over, in a mesh, and how.

    Attributes
    ----------
    mesh
        That of the enclosing `jax.shard_map` where there is one.
    batch, heads, seq
        Names of axes of the mesh.
    context, order
        How attention is computed over spread tokens, and in which order they stand.
    """

    mesh: Mesh | AbstractMesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    seq: tuple[str, ...]
    context: Context
    order: Order

    def places(self, axes: tuple[str, ...]) -> int:
        """Count the places along axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def parts(self) -> int:
        """Into how many parts the tokens are cut."""
        return self.places(self.seq)

    @property
    def exchanges(self) -> bool:
        """Whether heads are exchanged for tokens."""
        return self.parts > 1 and self.context == "all_to_all"

    def shares_keys(self, call: AttentionCall) -> bool:
        """Whether key heads do not suffice for all places, so that each picks one of them all."""
        return call.kv_heads < self.places(self.heads)

    def at_a_place(self, call: AttentionCall) -> AttentionCall:
        """Describe the part of a call that one place holds."""
        places = self.places(self.heads)
        local = replace(
            call,
            batch=call.batch // self.places(self.batch),
            q_len=call.q_len // self.parts,
            kv_len=call.kv_len // self.parts,
            heads=call.heads // places,
            kv_heads=1 if self.shares_keys(call) else call.kv_heads // places,
        )
        if call.bias is not None:
            bias = (min(call.bias[0], local.batch), min(call.bias[1], local.heads))
            local = replace(local, bias=bias)
        return local

    def specs(self, call: AttentionCall, operands: Operands) -> Any:
        """Say over which axes each operand is spread, None for those that are not given."""
        # Bias and slopes are handed to the places that their heads are exchanged to.
        exchanged = self.heads + self.seq if self.exchanges else self.heads
        kv = _spec(self.batch, self.seq, () if self.shares_keys(call) else self.heads)
        tokens = _spec(self.batch, self.seq)
        bias = None
        if operands.bias is not None:
            # What is of size 1 along batch or heads holds for all of them.
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

    def of_results(self) -> tuple[PartitionSpec, PartitionSpec]:
        """Say over which axes the output and the log-sum-exp are spread."""
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
    """Check over which axes is to be spread, and how.

    Within a `jax.shard_map` it is that one's mesh that is spread over, as far as it is not yet.

    Raises
    ------
    ValueError
        With one line for each thing that is wrong.
    """
    for name, given, allowed in (("context", context, Context), ("order", order, Order)):
        if given not in get_args(allowed.__value__):
            choices = ", ".join(map(repr, get_args(allowed.__value__)))
            raise ValueError(f"{name} is {given!r}; it must be one of {choices}")
    here = jax.sharding.get_abstract_mesh()
    if here.manual_axes and dict(here.shape) != dict(mesh.shape):
        raise ValueError(
            f"the mesh is {dict(mesh.shape)}, that of the enclosing shard_map {dict(here.shape)}; "
            "give the same"
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
                problems.append(f"{name} names {axis!r}; the mesh has the axes {among}")
            elif axis in here.manual_axes:
                problems.append(
                    f"{name} names {axis!r}, over which the enclosing shard_map has spread "
                    "already: leave it out"
                )
    every = batch + heads + seq
    problems += [
        f"{', '.join(named)} name {axis!r} {every.count(axis)} times; once is allowed"
        for axis in dict.fromkeys(every)
        if every.count(axis) > 1
    ]
    _raise_all(problems)
    return AttentionSharding(here if here.manual_axes else mesh, batch, heads, seq, context, order)


def check_call(spread: AttentionSharding, call: AttentionCall) -> None:
    """Check that a call can be spread.

    Raises
    ------
    ValueError
        With one line for each thing that is wrong.
    """
    problems = list(_size_problems(spread, call))
    if spread.exchanges and spread.order != "contiguous":
        problems.append(
            f'order is {spread.order!r} and context is "all_to_all", which balances the work as it '
            'is: leave the tokens in their order and give order="contiguous", or context="ring"'
        )
    if spread.parts > 1 and spread.context == "ring":
        problems += [
            f'context is "ring", which has no {what}: give context="all_to_all", or leave it out'
            for what, given in (
                (f"dropout (dropout_rate is {call.dropout_rate})", call.dropout_rate > 0),
                ("bias", call.bias is not None),
                ("alibi_slopes", call.alibi),
                ("q_offset", call.q_offset != 0),
            )
            if given
        ]
        if call.q_len != call.kv_len and (call.causal or call.window is not None):
            problems.append(
                f'context is "ring" and there are {call.q_len} queries and {call.kv_len} keys; '
                "under a causal mask or a window they must be the same tokens: give "
                'context="all_to_all"'
            )
    _raise_all(problems)


def _size_problems(spread: AttentionSharding, call: AttentionCall) -> Iterator[str]:
    ring, pad = ', or give context="ring"' if spread.exchanges else "", ": pad the sequence"
    for name, size, axes, advice in (
        ("batch", call.batch, spread.batch, ""),
        ("heads", call.heads, spread.heads + (spread.seq if spread.exchanges else ()), ring),
        ("q_len", call.q_len, spread.seq, pad),
        ("kv_len", call.kv_len, spread.seq, pad),
    ):
        if size % spread.places(axes):
            yield (
                f"{name} is {size} and is spread over {spread.places(axes)} places "
                f"({', '.join(axes)}); it must be a multiple of them{advice}"
            )
    places = spread.places(spread.heads)
    if call.kv_heads % places and places % call.kv_heads:
        yield (
            f"kv_heads is {call.kv_heads} and is spread over {places} places "
            f"({', '.join(spread.heads)}); one must be a multiple of the other"
        )


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))
