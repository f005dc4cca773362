"""Exponential moving average of the parameters, and the parameters to evaluate."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from tjx_optim.param_rules import leaves_by_path, map_with_path


class AverageState(NamedTuple):
    """State of `average_parameters`.

    Attributes
    ----------
    update_count : int32 scalar
        Number of updates.
    average : pytree like the parameters
        The moving average; before the first update the initial parameters.
    """

    update_count: jax.Array
    average: Any


def average_parameters(decay: float) -> optax.GradientTransformation:
    """Track the exponential moving average of the updated parameters; leave updates unchanged.

    After t updates the parameters after update s have the weight ``(1 - decay) decay^(t - s) /
    (1 - decay^t)``, and the initial parameters none. Use it last in a chain. (``optax.ema``
    computes 1 - decay^t in float32: with the decay 0.9999 its first averages are wrong in the
    fourth digit.)

    Parameters
    ----------
    decay : float
        In [0, 1); the average spans about ``1 / (1 - decay)`` updates.

    Returns
    -------
    optax.GradientTransformation
        Its ``update`` requires the parameters.
    """

    def init(params: Any) -> AverageState:
        # A copy, so that a step can donate both the parameters and the state.
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        count = jnp.asarray(optax.safe_increment(state.update_count))
        weight = jnp.float32(1)
        if decay > 0:
            weight = (1 - decay) / -jnp.expm1(count.astype(jnp.float32) * math.log(decay))
        average = jax.tree.map(
            lambda mean, new: mean + weight * (new - mean),
            state.average,
            optax.apply_updates(params, updates),
        )
        return updates, AverageState(count, average)

    return optax.GradientTransformation(init, update)


def evaluation_params(opt_state: Any, params: Any) -> Any:
    """Return the parameters for evaluation, export and generation.

    Parameters
    ----------
    opt_state : pytree
        State of an optimizer of `make_optimizer`, or a larger state that contains it.
    params : pytree
        The trained parameters.

    Returns
    -------
    pytree like `params`
        With ``ema_decay`` the moving average; with schedule_free_adamw the average x of algorithm
        1 of Defazio et al. 2024; otherwise, and for frozen parameters, `params` unchanged.

    Raises
    ------
    ValueError
        If the state contains several averages.

    Examples
    --------
    >>> import jax, numpy as np
    >>> from tjx_optim import OptimizerConfig, make_optimizer
    >>> params = jax.device_put({"kernel": np.ones((2, 2), np.float32)})
    >>> state = jax.jit(make_optimizer(OptimizerConfig(ema_decay=0.99)).init)(params)
    >>> print(jax.jit(evaluation_params)(state, params)["kernel"])
    [[1. 1.]
     [1. 1.]]
    """
    kinds = (AverageState, contrib.ScheduleFreeState)  # type: ignore[attr-defined]  # public
    states = [
        node
        for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
        if isinstance(node, kinds)
    ]
    if not states:
        return params
    if len(states) > 1:
        raise ValueError(
            f"opt_state: got {len(states)} averages of the parameters; expected at most one; pass "
            "the state of one optimizer"
        )
    (state,) = states
    if isinstance(state, AverageState):
        averages = leaves_by_path(state.average)
        return map_with_path(lambda path, param: averages.get(path, param), params)
    x_of = contrib.schedule_free_eval_params  # type: ignore[attr-defined]  # public
    z = leaves_by_path(state.z)
    return map_with_path(
        lambda path, y: x_of(state._replace(z=z[path]), y) if path in z else y, params
    )
