"""Gradients of a model whose blocks are divided among pipeline stages."""

import math
from typing import Any

import jax
import jax.numpy as jnp

import tjx_nn
import tjx_optim
import tjx_parallel
from tjx_nn.layout import RESIDUAL_AXES, Layout
from tjx_trainer.config.run_config import Config
from tjx_trainer.training.train_step import Gradients


def make_pipeline_gradients(
    config: Config, mesh: jax.sharding.Mesh, layout: Layout, accumulation: int
) -> Gradients:
    """Return the gradient function of a pipeline; parameters as for `make_gradients`."""
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
