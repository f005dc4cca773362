"""Gradients of the loss over microbatches, by accumulation or in a pipeline."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import tjx_nn
import tjx_optim
import tjx_parallel
from tjx_nn.id_checks import IGNORE_INDEX
from tjx_nn.layout import RESIDUAL_AXES, Layout
from tjx_trainer.config.run_config import RL_TASKS, Config

Batch = Mapping[str, jax.Array]
# (params, microbatches [k, ...], loss scale, base or None) -> means over the batch and their
# gradients. With low-rank adapters, params are the adapters and base the model's parameters.
Gradients = Callable[[Any, Any, jax.Array | None, Any], tjx_optim.AccumulatedGradients]


def make_gradients(
    config: Config, mesh: jax.sharding.Mesh, layout: Layout, *, accumulation: int
) -> Gradients:
    """Return the function that computes the mean loss of a batch and its gradients.

    Parameters
    ----------
    config : Config
        Resolved.
    mesh : jax.sharding.Mesh
        The device mesh; with several stages the microbatches are pipelined.
    layout : Layout
        The sharding of the model on the mesh.
    accumulation : int
        Microbatches in a batch.
    """
    if mesh.shape["stage"] > 1:
        return _pipelined(config, mesh, layout, accumulation)
    if config.task in RL_TASKS:
        from tjx_trainer.rl.objectives import make_response_loss_sum as make_sum
    else:
        make_sum = make_loss_sum

    def gradients(
        params: Any, microbatches: Any, loss_scale: jax.Array | None, base: Any
    ) -> tjx_optim.AccumulatedGradients:
        loss_sum = make_sum(config, layout, base)
        return tjx_optim.accumulate_gradients(loss_sum, params, microbatches, loss_scale=loss_scale)

    return gradients


def bind_trained(config: Config, params: Any, base: Any, layout: Layout) -> Any:
    """Make the model of the trained parameters: all of them, or adapters of `base`."""
    if base is None:
        return tjx_nn.bind(config.model, params, layout=layout)
    return tjx_nn.lora.bind(config.model, config.lora, base, params, layout=layout)


def make_loss_sum(config: Config, layout: Layout, base: Any = None) -> tjx_optim.LossSum:
    """Return the differentiated function: from (params, microbatch) to sums over its labels."""

    def loss_sum(params: Any, microbatch: Batch) -> tuple[jax.Array, Any]:
        network = bind_trained(config, params, base, layout)
        losses = network.losses(**microbatch)
        count = (microbatch["labels"] != IGNORE_INDEX).sum()
        cross_entropy = losses.tokens.sum()
        # Penalties are means over tokens: as sums they weigh the same in microbatches of any size.
        sums = {name: count * value for name, value in losses.aux_losses.items()}
        sums["loss"] = cross_entropy
        return cross_entropy + count * losses.penalty, (count, sums)

    return loss_sum


def _pipelined(
    config: Config, mesh: jax.sharding.Mesh, layout: Layout, accumulation: int
) -> Gradients:
    """Return the gradient function of a model whose blocks are divided among pipeline stages."""
    stages, chunks = mesh.shape["stage"], config.mesh.chunks_per_stage
    schedule = tjx_parallel.make_pipeline_schedule(
        config.mesh.pipeline, stages, accumulation, chunks
    )
    parts = tjx_nn.pipeline_parts(config.model, layout, chunks=stages * chunks)

    def gradients(
        params: Any, microbatches: Any, loss_scale: jax.Array | None, base: Any
    ) -> tjx_optim.AccumulatedGradients:
        assert base is None  # the configuration refuses adapters with stages
        scale = jnp.float32(1) if loss_scale is None else loss_scale
        found, scalars = tjx_parallel.pipeline_gradients(
            parts.begin, parts.run_stage, parts.finish, *parts.split(params), microbatches,
            mesh=mesh, schedule=schedule, loss_scale=scale,
            split_tokens=_can_split_tokens(microbatches, mesh), spec=_residual_spec(config, mesh),
        )  # fmt: skip
        totals = tjx_optim.LossTotals(*scalars)
        return tjx_optim.mean_gradients(parts.merge(*found), totals, loss_scale=scale)

    return gradients


def _residual_spec(config: Config, mesh: jax.sharding.Mesh) -> jax.sharding.PartitionSpec:
    """Return the sharding of the residual stream. Divisibility was checked before."""
    rules = tjx_parallel.ShardingRules.of(config.mesh)
    shape = (mesh.size,) * len(RESIDUAL_AXES)
    spec: jax.sharding.PartitionSpec = rules.spec(mesh, RESIDUAL_AXES, shape, name="stream")
    return spec


def _can_split_tokens(microbatches: Any, mesh: jax.sharding.Mesh) -> bool:
    """Return whether the stages can share the output head, each with part of the tokens."""
    labels = microbatches["labels"]
    places = math.prod(mesh.shape[axis] for axis in ("stage", "context", "tensor"))
    return bool(labels.ndim > 2 and labels.shape[2] % places == 0)
