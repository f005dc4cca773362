"""Layers divided among stages of devices; the gradients of a batch, whatever the schedule.

Axes in shapes: b sequences of a microbatch, T tokens, D width, L layers, M microbatches.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from tjx_parallel.pipeline.schedule import PipelineSchedule
from tjx_parallel.pipeline.stage import (
    Begin,
    Finish,
    PipelineStage,
    PipelineSums,
    RunStage,
    at,
    put,
)

_lax: Any = jax.lax  # JAX gives no types
_spec: Any = PartitionSpec


def pipeline_gradients(
    begin: Begin,
    run_stage: RunStage,
    finish: Finish,
    outer: Any,
    layers: Any,
    microbatches: Any,
    *,
    mesh: Mesh,
    schedule: PipelineSchedule,
    spec: PartitionSpec,
    loss_scale: Any = 1.0,
    split_tokens: bool = True,
) -> tuple[tuple[Any, Any], PipelineSums]:
    """Return the gradients of a batch, computed by the stages of a pipeline; inside `jax.jit`.

    They are those of the sum over microbatches of all losses that `run_stage` and `finish` return,
    up to the order of sums. Layers are stored in order: with several chunks a stage they move to
    the stages that run them before the first tick, and their gradients back after the last.

    Parameters
    ----------
    begin
        (outer, microbatch) -> x [b, T, D].
    run_stage
        (layers of a chunk, number of the first (traced), x, microbatch) -> (x of the same shape and
        dtype, (loss, sums)): scalars, the loss a penalty to be added.
    finish
        (outer, x, microbatch, take) -> (sum of losses, (count, sums)). With `split_tokens` x is
        [b, T / stages, D], every stages-th token, and ``take`` picks those of labels or any other
        array [b, T, ...]; without, x has all and ``take`` returns what it is given.
    outer
        Parameters of `begin` and `finish`, whole on each stage.
    layers
        Parameters [L, ...], divided by the mesh axis "stage".
    microbatches
        Arrays [M, b, ...].
    mesh
        Has an axis "stage"; its other axes are in Auto mode, in the three functions too.
    schedule
        From `make_schedule`.
    spec
        How x lies on the other axes of the mesh.
    loss_scale
        Factor of the gradients; the sums are without.
    split_tokens
        Whether stages share `finish`; else each does all of it, and what the last one finds counts.

    Returns
    -------
    tuple
        Gradients of (outer, layers), at least float32, and the sums.

    Raises
    ------
    ValueError
        If mesh, microbatches, layers or tokens do not fit the schedule.
    """
    if mesh.shape["stage"] != schedule.stages:
        raise ValueError(f"mesh of {mesh.shape['stage']} stages, schedule of {schedule.stages}")
    if (sizes := _first_sizes(microbatches)) != {schedule.microbatches}:
        raise ValueError(f"{sizes} microbatches, schedule of {schedule.microbatches}")
    for size in _first_sizes(layers):
        schedule.layers_per_chunk(size)

    def on_stage(outer: Any, layers: Any, microbatches: Any, scale: Any) -> Any:
        index = _lax.axis_index("stage")
        move = partial(_exchange, schedule, index)
        chunks = jax.tree.map(
            lambda leaf: move(leaf.reshape(schedule.chunks, -1, *leaf.shape[1:])), layers
        )
        stage = PipelineStage(begin, run_stage, finish, schedule, spec, split_tokens, outer, chunks,
                      microbatches, scale, index)  # fmt: skip
        outer, chunks, sums = stage.run()
        layers = jax.tree.map(
            lambda leaf, like: move(leaf, back=True).reshape(like.shape), chunks, layers
        )
        return (outer, layers), sums

    run = jax.shard_map(
        on_stage,
        mesh=mesh,
        axis_names={"stage"},
        in_specs=(_spec(), _spec("stage"), _spec(), _spec()),
        out_specs=((_spec(), _spec("stage")), _spec()),
        check_vma=False,  # else each backward pass would sum the gradients of `outer` over stages
    )
    gradients, sums = run(outer, layers, microbatches, jnp.float32(loss_scale))
    return gradients, sums


def _exchange(schedule: PipelineSchedule, index: Any, leaf: Any, *, back: bool = False) -> Any:
    """Move chunks [chunks, ...] from the stages that store to those that run them, or back.

    In each of as many rounds as there are chunks, each stage sends one and receives one.
    """
    chunks, stages = schedule.chunks, schedule.stages
    if chunks == 1:
        return leaf
    number = np.arange(chunks * stages)
    rounds = (number + number // math.lcm(chunks, stages)) % chunks
    stored, run = np.divmod(number, chunks), np.divmod(number, stages)[::-1]
    (source, give), (target, slot) = (run, stored) if back else (stored, run)
    moved = jnp.zeros_like(leaf)
    for turn in range(chunks):
        now = rounds == turn
        sent = at(leaf, jnp.asarray(give[now][np.argsort(source[now])])[index])
        sent = _lax.ppermute(sent, "stage", list(zip(source[now], target[now], strict=True)))
        moved = put(moved, sent, jnp.asarray(slot[now][np.argsort(target[now])])[index])
    return moved


def _first_sizes(tree: Any) -> set[int]:
    return {leaf.shape[0] for leaf in jax.tree.leaves(tree)}
