"""Train state: step, parameters, optimizer state and non-finite guard."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import tjx_nn
import tjx_optim
import tjx_parallel
from tjx_trainer.config.run_config import Config
from tjx_trainer.training.pretrained import pretrained_params

# Arrays [rows, ...] by name, on the devices: the arguments of the model's `losses` method.
Batch = Mapping[str, jax.Array]
# Branch of the seed beyond the last step.
_ADAPTERS = 2**32 - 1


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
    base : nested dict of arrays or None
        With ``lora.rank`` the model's parameters in ``lora.base_dtype``, which stay as they are;
        `params` are the adapters.
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: optax.OptState
    guard: tjx_optim.GuardState
    base: dict[str, Any] | None = None


def scales_loss(config: Config) -> bool:
    """Return whether the loss is scaled against underflow of gradients: only in fp16."""
    return config.train.precision == "fp16"


def eval_params(
    config: Config,
    params: dict[str, Any],
    opt_state: optax.OptState,
    base: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the model's parameters for evaluation, sampling and export.

    These are the average that the optimizer keeps with ``ema_decay`` or in schedule-free training;
    otherwise `params` itself, not a copy. Adapters are merged into a copy of `base`.
    """
    if config.optimizer.averages:
        params = jax.jit(tjx_optim.evaluation_params)(opt_state, params)
    return model_params(config, params, base)


def model_params(
    config: Config, params: dict[str, Any], base: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the parameters of the model: `params`, or adapters merged into a copy of `base`."""
    if base is None:
        return params
    merged: dict[str, Any] = jax.jit(tjx_nn.lora.merge, static_argnums=2)(base, params, config.lora)
    return merged


def trained_axes(config: Config) -> dict[str, Any]:
    """Return the logical axes of each trained parameter."""
    if config.lora.rank is None:
        return tjx_nn.logical_axes(config.model)
    return tjx_nn.lora.logical_axes(config.model, config.lora)


def trained_stack_axes(config: Config) -> dict[str, Any]:
    """Return the number of leading axes of each trained parameter that stack layers."""
    if config.lora.rank is None:
        return tjx_nn.stack_axes(config.model)
    return tjx_nn.lora.stack_axes(config.model, config.lora)


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
    axes = trained_axes(config)
    sharded = tjx_parallel.param_shardings(mesh, rules, axes, shapes.params)
    without = tjx_parallel.STORAGE_AXES if config.mesh.zero < 3 else ()

    def stored(axes: Any, shapes: Any) -> Any:
        return tjx_parallel.param_shardings(mesh, rules, axes, shapes, without=without)

    # ZeRO stage 1 and above: the optimizer state is sharded even where parameters are not.
    shardings: TrainState = tjx_parallel.state_shardings(shapes, sharded)._replace(
        params=stored(axes, shapes.params),
        base=None
        if shapes.base is None
        else stored(tjx_nn.lora.base_axes(config.model, config.lora), shapes.base),
    )
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
        of_model = shardings.params if shardings.base is None else _of_arrays(shardings.base)
        params = jax.device_put(pretrained_params(config), of_model)
        begin = jax.jit(
            lambda params: _state_of(config, optimizer, params), out_shardings=shardings
        )
        pretrained: TrainState = begin(params)
        return pretrained
    make = jax.jit(lambda: _initial_state(config, optimizer), out_shardings=shardings)
    state: TrainState = make()
    return state


def _of_arrays(base: Any) -> Any:
    """Return the shardings of a model from those of the base of adapters, maybe quantized."""

    def is_quantized(node: Any) -> bool:
        return isinstance(node, tjx_nn.Int8Kernel | tjx_nn.Int4Kernel)

    return jax.tree.map(lambda s: s.values if is_quantized(s) else s, base, is_leaf=is_quantized)


def _initial_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    return _state_of(config, optimizer, tjx_nn.init(config.model, jax.random.key(config.seed)))


def _state_of(
    config: Config, optimizer: optax.GradientTransformation, params: dict[str, Any]
) -> TrainState:
    guard = tjx_optim.init_guard(config.guard, scales_loss=scales_loss(config))
    base = None
    if config.lora.rank is not None:
        key = jax.random.fold_in(jax.random.key(config.seed), _ADAPTERS)
        base = tjx_nn.lora.base_params(config.model, config.lora, params)
        params = tjx_nn.lora.init(config.model, config.lora, key, base)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), guard, base)
