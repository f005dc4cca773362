"""A step that is not finite changes nothing, is counted, and halves the loss scale of float16.

optax's ``apply_if_finite`` applies a bad update after all when too many came in a row, and knows no
loss scale; here a bad update is never applied, and whoever runs the steps reads the count and ends.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tjx_optim.guard_config import GuardConfig


class GuardState(NamedTuple):
    """What the guard remembers between steps; saved with the rest of a train state.

    Attributes
    ----------
    loss_scale : float32 scalar
        Factor of the loss of the next step; 1 where the loss is not scaled.
    good_steps : int32 scalar
        Finite steps since the scale was last changed; 0 where the loss is not scaled.
    skipped : int32 scalar
        Steps that were skipped, in the whole run.
    skipped_in_a_row : int32 scalar
        Steps skipped since the last finite one; those whose loss scale could still be halved do not
        count, since the next step may well be finite.
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
        The first loss scale.
    scales_loss : bool
        Whether the loss is scaled: float16 needs it; bfloat16, with float32's range, does not.

    Returns
    -------
    GuardState
        Scalars.
    """
    zero = jnp.zeros((), jnp.int32)
    scale = jnp.float32(config.initial_scale if scales_loss else 1.0)
    return GuardState(scale, zero, zero, zero)


def update_guard(
    state: GuardState, finite: jax.Array, config: GuardConfig, *, scales_loss: bool = False
) -> GuardState:
    """Return the guard's state after a step.

    The scale is halved after a step that was not finite, down to ``config.min_scale``, and doubled
    after ``config.growth_interval`` finite ones (Micikevicius et al. 2018, section 3.2).

    Parameters
    ----------
    state : GuardState
        Before the step.
    finite : bool scalar
        Whether the step's loss and gradients were finite, as `is_finite` tells.
    config : GuardConfig
        Floor and growth of the scale.
    scales_loss : bool
        As for `initial_guard`.

    Returns
    -------
    GuardState
        Scalars; the same inside and outside ``jax.jit``.

    Examples
    --------
    >>> import jax, numpy as np
    >>> config = GuardConfig(initial_scale=2.0)
    >>> @jax.jit
    ... def two_bad_steps():
    ...     guard = initial_guard(config, scales_loss=True)
    ...     guard = next_guard(guard, jnp.bool_(False), config, scales_loss=True)
    ...     return next_guard(guard, jnp.bool_(False), config, scales_loss=True)
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
    """Tell whether every number of a tree is finite.

    Parameters
    ----------
    tree : pytree of float arrays
        A loss and the norm of its gradients say it for all of them: a norm is finite only where
        each of its terms is (and where their squares do not overflow float32, beyond 1e19).

    Returns
    -------
    bool scalar
    """
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all()


def select_finite(finite: jax.Array, new: Any, old: Any) -> Any:
    """Return the new tree after a finite step, and the old one, bit for bit, after another.

    Parameters
    ----------
    finite : bool scalar
        As `is_finite` tells.
    new, old : pytrees of arrays, alike
        Parameters and optimizer state after and before the step. XLA selects while it writes, in
        the memory of the old one where that is donated: nothing is copied.

    Returns
    -------
    pytree of arrays
        Like both.
    """
    return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
