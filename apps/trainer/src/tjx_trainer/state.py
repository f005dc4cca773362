"""The train state: everything that a step changes, and nothing else."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import tjx_nn
import tjx_parallel
from tjx_trainer.config import ModelConfig


class TrainState(NamedTuple):
    """A plain pytree; randomness and data order are functions of (seed, step).

    Attributes
    ----------
    step : int32 scalar
        Number of updates made.
    params : nested dict of float32 arrays
        The model's parameters.
    opt_state : pytree
        The optimizer's state.
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: optax.OptState


def abstract_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    rules: tjx_parallel.ShardingRules,
) -> TrainState:
    """Return the shapes, dtypes and shardings of the state without computing anything.

    Raises
    ------
    ValueError
        When the mesh does not divide a dimension of a parameter, naming both.
    """
    shapes = jax.eval_shape(lambda: _initial_state(model, optimizer, 0))
    params = tjx_parallel.param_shardings(mesh, rules, tjx_nn.logical_axes(model), shapes.params)
    shardings = tjx_parallel.state_shardings(shapes, params)
    abstract: TrainState = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding), shapes, shardings
    )
    return abstract


def initial_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    *,
    seed: int,
) -> TrainState:
    """Make the state of step 0, each shard on its own device; equal on any mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(lambda: _initial_state(model, optimizer, seed), out_shardings=shardings)
    state: TrainState = make()
    return state


def _initial_state(
    model: ModelConfig, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    params = tjx_nn.init(model, jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
