"""Program of a pipeline stage, the same on all stages.

In each tick a stage sends its results, runs one chunk of its layers forward, then one backward from
the stored input, recomputing activations. The `PipelineSchedule` selects them; the results of idle
ticks are masked out. Only the last stage has the input of the head; all stages share its
computation by dividing the tokens.

Axes in shapes: b sequences of a microbatch, T tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tjx_parallel.pipeline.schedule import Phase, PipelineSchedule, Work

Sums = dict[str, Any]
Begin = Callable[[Any, Any], Any]
RunStage = Callable[[Any, Any, Any, Any], tuple[Any, tuple[Any, Sums]]]
Finish = Callable[[Any, Any, Any, Callable[[Any], Any]], tuple[Any, tuple[Any, Sums]]]

_lax: Any = jax.lax  # JAX gives no types
_spec: Any = PartitionSpec


class PipelineSums(NamedTuple):
    """Scalars summed over microbatches and stages: loss, count and further sums."""

    loss: Any  # float32: all losses
    count: Any  # of the dtype that `finish` returns
    sums: Sums  # float32: those of `run_stage` and `finish`


class _Carry(NamedTuple):
    """State of a stage between two ticks."""

    x: Any  # from the stage before
    cotangent: Any  # for the stage before
    inputs: Any  # [slots, b, T, D]
    outer: Any  # gradients
    layers: Any  # gradients [chunks, layers of a chunk, ...]
    sums: PipelineSums


@dataclass(frozen=True)
class PipelineStage:
    """Arguments of `pipeline_gradients` on one stage, and its program."""

    begin: Begin
    run_stage: RunStage
    finish: Finish
    schedule: PipelineSchedule
    spec: PartitionSpec
    split_tokens: bool
    outer: Any
    layers: Any  # [chunks, layers of a chunk, ...]
    microbatches: Any
    scale: Any
    index: Any

    def run(self) -> tuple[Any, Any, PipelineSums]:
        """Return the gradients of `outer` and of this stage's `layers`, and the sums."""
        carry, table = self._empty(), (self.schedule.forward, self.schedule.backward)
        for phase in self.schedule.phases():
            rows = jax.tree.map(lambda column, ticks=phase.ticks: column[ticks], table)
            carry, _ = _lax.scan(partial(self._tick, phase), carry, rows)
        outer, sums = _lax.psum((carry.outer, carry.sums), "stage")
        return outer, carry.layers, sums

    def _tick(self, phase: Phase, carry: _Carry, rows: tuple[Work, Work]) -> tuple[_Carry, None]:
        # Send first: the transfer overlaps with the forward pass.
        cotangent = self._send(carry.cotangent, -1) if phase.backward else None
        if phase.forward:
            carry = self._forward(carry, rows[0])
        if phase.backward:
            carry = self._backward(carry, rows[1], cotangent, head=phase.head)
        return carry, None

    def _forward(self, carry: _Carry, row: Work) -> _Carry:
        work, chunk, microbatch = self._own(row)

        def begin() -> Any:
            return jnp.where(self.index == 0, self.begin(self.outer, microbatch), carry.x)

        x = self._place(self._if_any(row, 0, 0, begin, lambda: carry.x))
        kept = jnp.where(work.runs, x, at(carry.inputs, work.slot))
        y, _ = self.run_stage(at(self.layers, chunk), self._first_layer(chunk), x, microbatch)
        return carry._replace(x=self._send(y, 1), inputs=put(carry.inputs, kept, work.slot))

    def _backward(self, carry: _Carry, row: Work, cotangent: Any, *, head: bool) -> _Carry:
        work, chunk, microbatch = self._own(row)

        def forward(layers: Any, x: Any) -> Any:
            y, (loss, sums) = self.run_stage(layers, self._first_layer(chunk), x, microbatch)
            return (y, jnp.asarray(loss, jnp.float32)), sums

        x = self._place(at(carry.inputs, work.slot))
        (y, loss), pull, sums = jax.vjp(forward, at(self.layers, chunk), x, has_aux=True)
        carry = carry._replace(sums=_add_sums(carry.sums, loss, 0, sums, work.runs))
        if head:
            carry, cotangent = self._if_any(
                row,
                -1,
                self.schedule.chunks - 1,
                lambda: self._head(carry, row.microbatch[-1], y, cotangent),
                lambda: (carry, cotangent),
            )
        found, cotangent = pull((cotangent, self.scale))
        cotangent = self._place(cotangent)
        total = _add(at(carry.layers, chunk), found, work.runs)

        def embed() -> Any:
            _, pull = jax.vjp(lambda outer: self.begin(outer, microbatch), self.outer)
            return _add(carry.outer, pull(cotangent)[0], (self.index == 0) & work.runs)

        return carry._replace(
            cotangent=cotangent,
            outer=self._if_any(row, 0, 0, embed, lambda: carry.outer),
            layers=jax.tree.map(partial(put, index=chunk), carry.layers, total),
        )

    def _head(self, carry: _Carry, number: Any, y: Any, cotangent: Any) -> tuple[_Carry, Any]:
        """Run `finish` forward and backward on a microbatch; return the cotangent of y."""
        microbatch, last = at(self.microbatches, number), self.index == self.schedule.stages - 1
        x = self._spread(jnp.where(last, y, jnp.zeros_like(y))) if self.split_tokens else y

        def losses(outer: Any, x: Any) -> Any:
            loss, counted = self.finish(outer, x, microbatch, self._take)
            return jnp.asarray(loss, jnp.float32), counted

        loss, pull, (count, sums) = jax.vjp(losses, self.outer, x, has_aux=True)
        found, dx = pull(self.scale)
        carry = carry._replace(
            outer=_add(carry.outer, found, last | self.split_tokens),
            sums=_add_sums(carry.sums, loss, count, sums, last | self.split_tokens),
        )
        return carry, jnp.where(last, self._collect(dx) if self.split_tokens else dx, cotangent)

    def _empty(self) -> _Carry:
        def both(x: Any, microbatch: Any) -> Any:
            _, (_, sums) = self.run_stage(at(self.layers, 0), self.index, x, microbatch)
            return self.finish(self.outer, self._take(x), microbatch, self._take)[1], sums

        microbatch = at(self.microbatches, 0)
        x = jax.eval_shape(self.begin, self.outer, microbatch)
        (count, sums), others = jax.eval_shape(both, x, microbatch)
        if shared := sorted(sums.keys() & others.keys()):
            raise ValueError(
                f"sums: got {', '.join(shared)} from run_stage and finish, which both return it; "
                "expected different names; rename one"
            )
        nothing = self._place(jnp.zeros(x.shape, x.dtype))
        inputs = jnp.zeros((self.schedule.slots, *x.shape), x.dtype)
        return _Carry(
            x=nothing,
            cotangent=nothing,
            inputs=_lax.with_sharding_constraint(inputs, _spec(None, *self.spec)),
            outer=jax.tree.map(_zeros, self.outer),
            layers=jax.tree.map(_zeros, self.layers),
            sums=PipelineSums(
                jnp.float32(0),
                jnp.zeros((), count.dtype),
                {name: jnp.float32(0) for name in (*sums, *others)},
            ),
        )

    def _own(self, row: Work) -> tuple[Work, Any, Any]:
        """Return the pass of this stage, its chunk (static if there is one) and microbatch."""
        work = at(row, self.index)
        chunk = work.chunk if self.schedule.chunks > 1 else 0
        return work, chunk, at(self.microbatches, work.microbatch)

    def _first_layer(self, chunk: Any) -> Any:
        size = jax.tree.leaves(self.layers)[0].shape[1]
        return (chunk * self.schedule.stages + self.index) * size

    def _if_any(self, row: Work, stage: int, chunk: int, then: Any, otherwise: Any) -> Any:
        """Run `then` only in ticks in which the given stage runs the given chunk.

        With one chunk per stage that is nearly every tick, so run it always.
        """
        if self.schedule.chunks == 1:
            return then()
        return _lax.cond(row.runs[stage] & (row.chunk[stage] == chunk), then, otherwise)

    def _place(self, x: Any) -> Any:
        return _lax.with_sharding_constraint(x, self.spec)

    def _send(self, x: Any, step: int) -> Any:
        stages = self.schedule.stages
        pairs = [(stage, (stage + step) % stages) for stage in range(stages)]
        return self._place(_lax.ppermute(x, "stage", pairs))

    def _take(self, array: Any) -> Any:
        """Return the tokens of this stage."""
        if not self.split_tokens:
            return array
        return _lax.dynamic_index_in_dim(self._split(array), self.index, 2, keepdims=False)

    def _split(self, array: Any) -> Any:
        """Return [b, T / stages, stages, ...], so that each stage's tokens stay evenly sharded."""
        b, tokens, *rest = array.shape
        stages = self.schedule.stages
        if tokens % stages:
            raise ValueError(
                f"split_tokens: got True with {tokens} tokens on a device; expected a multiple of "
                f"{stages} stages; change one of them, or give split_tokens=False, which computes "
                "the whole head on each stage"
            )
        return array.reshape(b, tokens // stages, stages, *rest)

    def _spread(self, y: Any) -> Any:
        return self._on_shards(
            lambda y: _lax.psum_scatter(self._split(y), "stage", scatter_dimension=2), y
        )

    def _collect(self, x: Any) -> Any:
        return self._on_shards(
            lambda x: _lax.all_gather(x, "stage", axis=2).reshape(len(x), -1, x.shape[-1]), x
        )

    def _on_shards(self, move: Callable[[Any], Any], x: Any) -> Any:
        """Apply `move` to each device's shard; the compiler would gather x first."""
        mesh = jax.sharding.get_abstract_mesh()
        names = set(mesh.axis_names) - set(mesh.manual_axes)
        return jax.shard_map(
            move, mesh=mesh, axis_names=names, in_specs=(self.spec,), out_specs=self.spec,
            check_vma=False,
        )(x)  # fmt: skip


def at(tree: Any, index: Any) -> Any:
    """Return an element of the first axis of each array."""
    return jax.tree.map(lambda a: _lax.dynamic_index_in_dim(a, index, keepdims=False), tree)


def put(array: Any, value: Any, index: Any) -> Any:
    """Return an array with another element of the first axis."""
    return _lax.dynamic_update_index_in_dim(array, value, index, 0)


def _add(total: Any, new: Any, counts: Any) -> Any:
    return jax.tree.map(lambda t, n: t + jnp.where(counts, n, 0).astype(t.dtype), total, new)


def _add_sums(total: PipelineSums, loss: Any, count: Any, sums: Sums, counts: Any) -> PipelineSums:
    known = PipelineSums(total.loss, total.count, {name: total.sums[name] for name in sums})
    added = _add(known, PipelineSums(loss, count, sums), counts)
    return PipelineSums(added.loss, added.count, total.sums | added.sums)


def _zeros(leaf: Any) -> Any:
    return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
