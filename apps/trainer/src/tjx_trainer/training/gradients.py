"""Gradients of the loss over microbatches, by accumulation or in a pipeline."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import tjx_nn
import tjx_optim
import tjx_parallel
from tjx_nn.layers.scan_layers import LayerRange
from tjx_nn.layout import RESIDUAL_AXES, Layout
from tjx_nn.losses import aux_loss_weights
from tjx_trainer.config.run_config import Config, ModelConfig

Batch = Mapping[str, jax.Array]
# (params, microbatches [k, ...], loss scale, base or None) -> means over the batch and their
# gradients. With low-rank adapters, params are the adapters and base the model's parameters.
Gradients = Callable[[Any, Any, jax.Array | None, Any], tjx_optim.AccumulatedGradients]

# Labels with this value are ignored: they contribute neither loss nor count.
IGNORE_INDEX = -100


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

    def gradients(
        params: Any, microbatches: Any, loss_scale: jax.Array | None, base: Any
    ) -> tjx_optim.AccumulatedGradients:
        loss_sum = make_loss_sum(config, layout, base)
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
        losses = network.losses(**_inputs(microbatch), labels=microbatch["labels"])
        count = _count(microbatch)
        cross_entropy = losses.tokens.sum()
        # Penalties are means over tokens: as sums they weigh the same in microbatches of any size.
        sums = {name: count * value for name, value in losses.aux_losses.items()}
        sums["loss"] = cross_entropy
        return cross_entropy + count * losses.penalty, (count, sums)

    return loss_sum


def _inputs(microbatch: Batch) -> dict[str, jax.Array]:
    """Return the model inputs of a microbatch: all entries but the labels."""
    names = {"key": "dropout_key"}
    return {names.get(name, name): x for name, x in microbatch.items() if name != "labels"}


def _count(microbatch: Batch) -> jax.Array:
    return (microbatch["labels"] != IGNORE_INDEX).sum()


def _pipelined(
    config: Config, mesh: jax.sharding.Mesh, layout: Layout, accumulation: int
) -> Gradients:
    """Return the gradient function of a model whose blocks are divided among pipeline stages."""
    model, choices = config.model, config.mesh
    parts = mesh.shape["stage"] * choices.chunks_per_stage
    schedule = tjx_parallel.make_pipeline_schedule(
        choices.pipeline, mesh.shape["stage"], accumulation, choices.chunks_per_stage
    )
    length = model.n_layer // parts
    divided = _is_block_param(model)
    # Abstract blocks: `embed_tokens` and `token_losses` do not read them.
    abstract_layers = jax.eval_shape(lambda: tjx_nn.init(model, jax.random.key(0)))

    def network(outer: Any, layers: Any, n_layer: int | None = None) -> Any:
        params = jax.tree.map(
            lambda is_layers, a, b: b if is_layers else a, divided, outer, layers,
            is_leaf=lambda node: node is None,
        )  # fmt: skip
        return tjx_nn.bind(model, params, layout=layout, n_layer=n_layer)

    def begin(outer: Any, microbatch: Batch) -> jax.Array:
        x: jax.Array = network(outer, abstract_layers).embed_tokens(**_inputs(microbatch))
        return x

    def run_stage(layers: Any, first: jax.Array, x: jax.Array, microbatch: Batch) -> Any:
        bound = network(abstract_layers, layers, length)
        x, [aux_losses] = bound.run_blocks(
            x, **_inputs(microbatch), layers=LayerRange(first, length)
        )
        count = _count(microbatch)
        sums = {name: count * each.sum() / model.n_layer for name, each in aux_losses.items()}
        weights = aux_loss_weights(model)
        terms = [weights[name] * value for name, value in sums.items() if name in weights]
        return x, (sum(terms, start=jnp.zeros((), jnp.float32)), sums)

    def finish(
        outer: Any, x: jax.Array, microbatch: Batch, take: Callable[[jax.Array], jax.Array]
    ) -> Any:
        labels = microbatch["labels"]
        if labels.ndim > 1:
            labels = take(layout.reorder(labels))
        cross_entropy = network(outer, abstract_layers).token_losses(x, labels).sum()
        return cross_entropy, ((labels != IGNORE_INDEX).sum(), {"loss": cross_entropy})

    def gradients(
        params: Any, microbatches: Any, loss_scale: jax.Array | None, base: Any
    ) -> tjx_optim.AccumulatedGradients:
        assert base is None  # the configuration refuses adapters with stages
        outer, layers = (
            jax.tree.map(
                lambda is_layers, x, w=which: x if is_layers == w else None, divided, params
            )
            for which in (False, True)
        )
        scale = jnp.float32(1) if loss_scale is None else loss_scale
        (of_outer, of_layers), scalars = tjx_parallel.pipeline_gradients(
            begin, run_stage, finish, outer, layers, microbatches,
            mesh=mesh, schedule=schedule, loss_scale=scale,
            split_tokens=_can_split_tokens(microbatches, mesh), spec=_residual_spec(config, mesh),
        )  # fmt: skip
        found = jax.tree.map(
            lambda is_layers, a, b: b if is_layers else a, divided, of_outer, of_layers,
            is_leaf=lambda node: node is None,
        )  # fmt: skip
        return tjx_optim.mean_gradients(found, tjx_optim.LossTotals(*scalars), loss_scale=scale)

    return gradients


def _is_block_param(model: ModelConfig) -> Any:
    """Return a tree of bools: whether each parameter belongs to the stacked blocks."""
    return jax.tree.map(
        lambda axes: axes[:1] == ("layers",),
        tjx_nn.logical_axes(model),
        is_leaf=lambda node: isinstance(node, tuple),
    )


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
