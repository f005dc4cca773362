"""Train state: step, parameters, optimizer state and non-finite guard."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import tjx_nn
import tjx_optim
import tjx_parallel
from tjx_trainer.config.run_config import Config
from tjx_trainer.training.pretrained import pretrained_params


class TrainState(NamedTuple):
    """State of training as a plain pytree.

    Randomness and data order are functions of (seed, step) and are not part of the state.

    Attributes
    ----------
    step : int32 scalar
        Number of updates made.
    params : nested dict of float32 arrays
        The model's parameters.
    opt_state : pytree
        The optimizer's state.
    guard : tjx_optim.GuardState
        Counts of skipped steps, and the loss scale.
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: optax.OptState
    guard: tjx_optim.GuardState


def scales_loss(config: Config) -> bool:
    """Return whether the loss is scaled against underflow of gradients: only in fp16."""
    return config.train.precision == "fp16"


def eval_params(
    config: Config, params: dict[str, Any], opt_state: optax.OptState
) -> dict[str, Any]:
    """Return the parameters for evaluation, sampling and export.

    These are the average that the optimizer keeps with ``ema_decay`` or in schedule-free training;
    otherwise `params` itself, not a copy.
    """
    if not config.optimizer.averages:
        return params
    average: dict[str, Any] = jax.jit(tjx_optim.evaluation_params)(opt_state, params)
    return average


def abstract_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    rules: tjx_parallel.ShardingRules,
) -> TrainState:
    """Return shapes, dtypes and shardings of the state without computing it.

    Raises
    ------
    ValueError
        If the mesh does not divide a dimension of a parameter; the message names both.
    """
    shapes = jax.eval_shape(lambda: _initial_state(config, optimizer))
    axes = tjx_nn.logical_axes(config.model)
    params = sharded = tjx_parallel.param_shardings(mesh, rules, axes, shapes.params)
    if config.mesh.zero < 3:
        params = tjx_parallel.param_shardings(
            mesh, rules, axes, shapes.params, without=tjx_parallel.STORAGE_AXES
        )
    # ZeRO stage 1 and above: the optimizer state is sharded even where parameters are not.
    shardings: TrainState = tjx_parallel.state_shardings(shapes, sharded)._replace(params=params)
    if config.mesh.offload == "optimizer":
        on_host = jax.tree.map(_on_host, shapes.opt_state, shardings.opt_state)
        shardings = shardings._replace(opt_state=on_host)
    abstract: TrainState = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding), shapes, shardings
    )
    return abstract


def _on_host(leaf: Any, sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
    """Return the sharding in pinned host memory; scalars stay on the device."""
    return sharding if leaf.ndim == 0 else sharding.with_memory_kind("pinned_host")


def shardings_of(abstract: TrainState) -> TrainState:
    """Return the sharding of each leaf of an abstract state."""
    shardings: TrainState = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return shardings


def bytes_on_device(tree: Any) -> int:
    """Return the bytes of a tree per device; leaves in host memory are not counted."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding.memory_kind != "pinned_host"
    )


def initial_state(
    config: Config, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """Initialize the state of step 0 with its shardings; the values do not depend on the mesh.

    Raises
    ------
    ValueError
        If ``train.init_from`` names weights that do not fit the model.
    """
    shardings = shardings_of(abstract)
    if config.train.init_from is not None:
        params = jax.device_put(pretrained_params(config), shardings.params)
        begin = jax.jit(
            lambda params: _state_of(config, optimizer, params), out_shardings=shardings
        )
        pretrained: TrainState = begin(params)
        return pretrained
    make = jax.jit(lambda: _initial_state(config, optimizer), out_shardings=shardings)
    state: TrainState = make()
    return state


def _initial_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    return _state_of(config, optimizer, tjx_nn.init(config.model, jax.random.key(config.seed)))


def _state_of(
    config: Config, optimizer: optax.GradientTransformation, params: dict[str, Any]
) -> TrainState:
    guard = tjx_optim.init_guard(config.guard, scales_loss=scales_loss(config))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), guard)
