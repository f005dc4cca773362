"""Skipping of non-finite steps, with the gradient norm that shows them, and the loss scale of fp16.

``optax.apply_if_finite`` applies a non-finite update after too many consecutive ones and has no
loss scale. Here a non-finite update is never applied; the training loop reads the count and stops.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tjx_optim.accumulation import at_least_float32
from tjx_optim.guard_config import GuardConfig


class GuardState(NamedTuple):
    """Loss scale and counts of skipped steps; part of the train state.

    Attributes
    ----------
    loss_scale : float32 scalar
        Factor of the loss of the next step; 1 without loss scaling.
    good_steps : int32 scalar
        Finite steps since the last change of the scale; 0 without loss scaling.
    skipped : int32 scalar
        Steps skipped in the whole run.
    skipped_in_a_row : int32 scalar
        Steps skipped since the last finite one. Steps whose loss scale could still be halved do
        not count.
    """

    loss_scale: jax.Array
    good_steps: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def init_guard(config: GuardConfig, *, scales_loss: bool = False) -> GuardState:
    """Return the guard's state before the first step.

    Parameters
    ----------
    config : GuardConfig
        Initial loss scale.
    scales_loss : bool
        Whether the loss is scaled: for float16, not for bfloat16, which has the range of float32.

    Returns
    -------
    GuardState
        Initial state, all scalars.
    """
    zero = jnp.zeros((), jnp.int32)
    scale = jnp.float32(config.initial_scale if scales_loss else 1.0)
    return GuardState(scale, zero, zero, zero)


def update_guard(
    state: GuardState, finite: jax.Array, config: GuardConfig, *, scales_loss: bool = False
) -> GuardState:
    """Return the guard's state after a step.

    The loss scale is halved after a non-finite step, down to ``config.min_scale``, and doubled
    after ``config.growth_interval`` finite ones (Micikevicius et al. 2018, section 3.2).

    Parameters
    ----------
    state : GuardState
        State before the step.
    finite : bool scalar
        Result of `is_finite` for the step's loss and gradient norm.
    config, scales_loss
        As for `init_guard`.

    Returns
    -------
    GuardState
        State after the step, all scalars.

    Examples
    --------
    >>> import jax, numpy as np
    >>> config = GuardConfig(initial_scale=2.0)
    >>> @jax.jit
    ... def two_bad_steps():
    ...     guard = init_guard(config, scales_loss=True)
    ...     guard = update_guard(guard, jnp.bool_(False), config, scales_loss=True)
    ...     return update_guard(guard, jnp.bool_(False), config, scales_loss=True)
    >>> guard = two_bad_steps()  # from scale 2 to 1, where a skipped step counts
    >>> float(guard.loss_scale), int(guard.skipped), int(guard.skipped_in_a_row)
    (1.0, 2, 1)
    """
    bad = jnp.where(finite, 0, 1).astype(jnp.int32)
    skipped = state.skipped + bad
    if not scales_loss:
        in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        return GuardState(state.loss_scale, state.good_steps, skipped, in_a_row)
    at_floor = state.loss_scale <= config.min_scale
    in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + at_floor.astype(jnp.int32))
    good_steps = jnp.where(finite, state.good_steps + 1, 0)
    grows = good_steps >= config.growth_interval
    scale = jnp.where(
        finite,
        jnp.where(grows, 2 * state.loss_scale, state.loss_scale),
        jnp.maximum(state.loss_scale / 2, config.min_scale),
    )
    return GuardState(scale, jnp.where(grows, 0, good_steps), skipped, in_a_row)


def is_finite(tree: Any) -> jax.Array:
    """Return whether all values of a tree are finite.

    Parameters
    ----------
    tree : pytree of float arrays
        Loss and global gradient norm suffice: one gradient that is not finite, or above 1e19, makes
        the norm infinite or NaN.

    Returns
    -------
    bool scalar
        False if any value is NaN or infinite.
    """
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all()


def select_finite(finite: jax.Array, new: Any, old: Any) -> Any:
    """Return the new tree after a finite step and the old one, bit for bit, otherwise.

    Parameters
    ----------
    finite : bool scalar
        Result of `is_finite`.
    new, old : pytrees of arrays with the same structure
        Parameters and optimizer state after and before the step. XLA fuses the selection into the
        update and reuses the memory of a donated `old`.

    Returns
    -------
    pytree of arrays
        `new` or `old`.
    """
    return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)


def global_norm(tree: Any) -> jax.Array:
    """Compute the L2 norm over all leaves together, in float32.

    Parameters
    ----------
    tree : pytree of float arrays
        Gradients, parameters or updates.

    Returns
    -------
    float32 scalar
        ``sqrt(sum of squares)``; narrower leaves are widened before they are squared.

    Examples
    --------
    >>> import jax, numpy as np
    >>> tree = jax.device_put({"a": np.array([3.0]), "b": np.array([[4.0]])})
    >>> float(jax.jit(global_norm)(tree))
    5.0

    Clipping alone is that of optax:

    >>> clip = jax.jit(optax.clip_by_global_norm(1.0).update)
    >>> print(clip(tree, optax.EmptyState())[0]["b"].round(1))
    [[0.8]]
    """
    return jnp.asarray(optax.tree.norm(jax.tree.map(at_least_float32, tree)), jnp.float32)
