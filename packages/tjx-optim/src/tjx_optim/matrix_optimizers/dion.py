"""Dion: low-rank orthonormal updates for weight matrices, AdamW for all other parameters.

Ahn et al. 2025, "Dion: Distributed Orthonormalized Updates", algorithm 1.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tjx_optim.matrix_optimizers.partition import UPDATE_RMS, map_leaves, partition_matrices
from tjx_optim.param_rules import ParameterRules

Settings = dict[str, float | bool]


class DionState(NamedTuple):
    """State of Dion for matrices [..., in, out].

    Attributes
    ----------
    momentum
        Momentum without what the updates have applied, like the parameters.
    right
        Right factors of the last updates, [..., out, rank].
    """

    momentum: Any
    right: Any


def scale_by_dion(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Turn gradients into Dion's directions.

    A weight matrix of a hidden layer moves by an orthonormal matrix of low rank, from one step of
    power iteration on its momentum; what the rank leaves out stays in the momentum. Embeddings,
    heads, biases and norms take AdamW's direction.

    Parameters
    ----------
    settings : dict
        ``momentum``, and ``rank_fraction`` of the shorter side of a matrix; ``b1``, ``b2`` and
        ``eps`` of AdamW.
    rules : ParameterRules
        Which parameters are matrices, and how many of their axes stack layers.

    Returns
    -------
    optax.GradientTransformation
        See `partition_matrices` for the errors of ``init``. Updates have the root mean square of
        muon's.
    """
    return partition_matrices("dion", rules, _low_rank_updates(settings), settings)


def _low_rank_updates(settings: Settings) -> optax.GradientTransformation:
    def init(params: Any) -> Any:
        def first_columns(p: jax.Array) -> jax.Array:
            rank = max(1, round(settings["rank_fraction"] * min(p.shape[-2:])))
            columns = jnp.eye(p.shape[-1], rank, dtype=p.dtype)
            return jnp.broadcast_to(columns, (*p.shape[:-2], *columns.shape))

        return DionState(jax.tree.map(jnp.zeros_like, params), jax.tree.map(first_columns, params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        step = partial(_update, settings["momentum"])
        new, *trees = map_leaves(step, updates, state.momentum, state.right)
        return new, DionState(*trees)

    return optax.GradientTransformation(init, update)


def _update(
    decay: float, g: jax.Array, momentum: jax.Array, right: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the direction of one parameter, its momentum and its right factor."""
    buffer = momentum + g
    left = jnp.linalg.qr(buffer @ right)[0]
    projected = buffer.mT @ left
    momentum = buffer - (1 - decay) * left @ projected.mT
    norms = jnp.linalg.norm(projected, axis=-2, keepdims=True)
    normalized = projected / jnp.maximum(norms, 1e-30)
    # A column of zeros would stay one: a matrix without a gradient keeps its factor.
    right = jnp.where(norms > 0, normalized, right)
    rms = UPDATE_RMS * math.sqrt(math.prod(g.shape[-2:]) / right.shape[-1])
    return rms * left @ normalized.mT, momentum, right
