"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, AdamW for all other parameters.

Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam", algorithms 3 and 4.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tjx_optim.matrix_optimizers.partition import map_leaves, partition_matrices
from tjx_optim.param_rules import ParameterRules

Settings = dict[str, float | bool]


class SoapState(NamedTuple):
    """State of SOAP for matrices [..., in, out].

    Attributes
    ----------
    updates
        Number of updates, an int32 scalar.
    mean
        First moments, like the parameters.
    square
        Second moments in the eigenbases, like the parameters.
    left, right
        Moving means of ``g @ g.T``, [..., in, in], and ``g.T @ g``, [..., out, out].
    left_basis, right_basis
        Their eigenvectors as columns, of about descending eigenvalues.
    """

    updates: Any
    mean: Any
    square: Any
    left: Any
    right: Any
    left_basis: Any
    right_basis: Any


def scale_by_soap(settings: Settings, rules: ParameterRules) -> optax.GradientTransformation:
    """Turn gradients into SOAP's directions.

    Weight matrices of hidden layers are updated by Adam in the eigenbasis of the moving means of
    ``g @ g.T`` and ``g.T @ g``; embeddings, heads, biases and norms take AdamW's direction.

    Parameters
    ----------
    settings : dict
        ``b1``, ``b2``, ``eps``, and ``precondition_every``: updates between two steps of the
        eigenvectors.
    rules : ParameterRules
        Which parameters are matrices, and how many of their axes stack layers.

    Returns
    -------
    optax.GradientTransformation
        See `partition_matrices` for the errors of ``init``. The first update of the matrices is 0:
        it makes the first eigenbasis, in which its own gradient is diagonal.
    """
    return partition_matrices("soap", rules, _adam_in_eigenbases(settings), settings)


def _adam_in_eigenbases(settings: Settings) -> optax.GradientTransformation:
    def init(params: Any) -> Any:
        def zeros(axis: int | None = None) -> Any:
            def of(p: jax.Array) -> jax.Array:
                shape = p.shape if axis is None else (*p.shape[:-2], p.shape[axis], p.shape[axis])
                return jnp.zeros(shape, p.dtype)

            return jax.tree.map(of, params)

        count = jnp.zeros((), jnp.int32)
        return SoapState(count, zeros(), zeros(), zeros(-2), zeros(-1), zeros(-2), zeros(-1))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        count, *trees = state
        new, *trees = map_leaves(partial(_update, settings, count), updates, *trees)
        return new, SoapState(optax.safe_increment(count), *trees)

    return optax.GradientTransformation(init, update)


def _update(
    settings: Settings,
    count: jax.Array,
    g: jax.Array,
    mean: jax.Array,
    square: jax.Array,
    left: jax.Array,
    right: jax.Array,
    left_basis: jax.Array,
    right_basis: jax.Array,
) -> tuple[jax.Array, ...]:
    """Return the direction of one parameter and its new state, without the count."""
    b1, b2 = settings["b1"], settings["b2"]
    first = count == 0

    def rotate(x: jax.Array) -> jax.Array:
        return left_basis.mT @ x @ right_basis

    mean = jnp.where(first, mean, b1 * mean + (1 - b1) * g)
    square = jnp.where(first, square, b2 * square + (1 - b2) * rotate(g) ** 2)
    t = jnp.maximum(count, 1)
    corrected = jnp.sqrt(square / (1 - b2**t)) + settings["eps"]
    direction = left_basis @ (rotate(mean) / (1 - b1**t) / corrected) @ right_basis.mT

    left = b2 * left + (1 - b2) * g @ g.mT
    right = b2 * right + (1 - b2) * g.mT @ g
    due = count % int(settings["precondition_every"]) == 0
    left_basis, left_order = _next_basis(left, left_basis, first, due)
    right_basis, right_order = _next_basis(right, right_basis, first, due)
    square = jnp.take_along_axis(square, left_order[..., :, None], axis=-2)
    square = jnp.take_along_axis(square, right_order[..., None, :], axis=-1)
    return jnp.where(first, 0, direction), mean, square, left, right, left_basis, right_basis


def _next_basis(
    covariance: jax.Array, basis: jax.Array, first: jax.Array, due: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the new eigenbasis, and the order in which it holds the old eigenvectors.

    The first one is computed; each later one takes a step of orthogonal iteration from the basis
    before, sorted by descending eigenvalue, for which the iteration is stable.
    """
    order = jnp.broadcast_to(jnp.arange(basis.shape[-1]), basis.shape[:-1])

    def keep() -> tuple[jax.Array, jax.Array]:
        return basis, order

    def decompose() -> tuple[jax.Array, jax.Array]:
        return jnp.linalg.eigh(covariance)[1][..., ::-1], order

    def iterate() -> tuple[jax.Array, jax.Array]:
        values = jnp.einsum("...ij,...ik,...kj->...j", basis, covariance, basis)
        descending = jnp.argsort(-values, axis=-1)
        sorted_basis = jnp.take_along_axis(basis, descending[..., None, :], axis=-1)
        return jnp.linalg.qr(covariance @ sorted_basis)[0], descending

    index = jnp.where(first, 0, jnp.where(due, 1, 2))
    result: tuple[jax.Array, jax.Array] = jax.lax.switch(index, [decompose, iterate, keep])
    return result
