"""Pipeline parallelism: gradients of a batch for any pipeline schedule.

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
    """Compute the gradients of a batch with pipeline parallelism; inside `jax.jit`.

    The loss is the sum over microbatches of the losses that `run_stage` and `finish` return; only
    the summation order depends on the schedule. Layers are stored in order: with several chunks per
    stage they are sent to the stages that run them before the first tick, and their gradients back
    after the last.

    Parameters
    ----------
    begin
        (outer, microbatch) -> x [b, T, D].
    run_stage
        (layers of a chunk, index of the first (traced), x, microbatch) -> (x of the same shape and
        dtype, (loss, sums)): scalars; the loss is an auxiliary loss.
    finish
        (outer, x, microbatch, take) -> (sum of losses, (count, sums)). With `split_tokens` x is
        [b, T / stages, D], every stages-th token, and ``take`` selects the same tokens of labels or
        another array [b, T, ...]; without, x has all tokens and ``take`` is the identity.
    outer
        Parameters of `begin` and `finish`, replicated over stages.
    layers
        Parameters [L, ...], sharded over the mesh axis "stage".
    microbatches
        Arrays [M, b, ...].
    mesh
        Device mesh with an axis "stage"; the other axes are in Auto mode, also in the functions.
    schedule
        From `make_pipeline_schedule`.
    spec
        Partition spec of x over the other mesh axes.
    loss_scale
        Factor of the gradients, not of the sums.
    split_tokens
        Whether the stages divide the tokens of `finish`; else each stage computes all of it and the
        result of the last stage is used.

    Returns
    -------
    tuple
        Gradients of (outer, layers), float32 or wider, and the sums.

    Raises
    ------
    ValueError
        If mesh, microbatches, layers or tokens do not match the schedule.
    """
    if mesh.shape["stage"] != schedule.stages:
        raise ValueError(
            f"mesh: got {mesh.shape['stage']} stages; expected {schedule.stages}, as in the "
            "schedule; make the schedule for this mesh"
        )
    if (sizes := _first_sizes(microbatches)) != {schedule.microbatches}:
        raise ValueError(
            f"microbatches: got {sizes}; expected {schedule.microbatches}, as in the "
            "schedule; make the schedule for this number"
        )
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
        check_vma=False,  # else each backward pass sums the gradients of `outer` over stages
    )
    gradients, sums = run(outer, layers, microbatches, jnp.float32(loss_scale))
    return gradients, sums


def _exchange(schedule: PipelineSchedule, index: Any, leaf: Any, *, back: bool = False) -> Any:
    """Send chunks [chunks, ...] from the stages with their storage to their workers, or back.

    There are as many rounds as chunks; in each round a stage sends and receives one chunk.
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
