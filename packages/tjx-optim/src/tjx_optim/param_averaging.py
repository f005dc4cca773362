"""Running means of the parameters, and which parameters to evaluate."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from tjx_optim.param_paths import leaves_by_path, map_with_path


class AverageState(NamedTuple):
    """What a running mean keeps.

    Attributes
    ----------
    update_count : int32 scalar
        Number of updates made.
    average : pytree like the parameters
        Their mean; before the first update the parameters that training starts from.
    """

    update_count: jax.Array
    average: Any


def average_parameters(decay: float) -> optax.GradientTransformation:
    """Keep the exponential moving average of the parameters after each update; change nothing.

    After t updates the parameters of update s weigh ``(1 - decay) decay^(t - s) / (1 - decay^t)``:
    those that training starts from have no weight. It comes last in a chain. (``optax.ema`` takes
    1 - decay^t in float32: with the decay 0.9999 its first means are wrong in the fourth digit.)

    Parameters
    ----------
    decay : float
        Between 0 and 1; the mean is over about ``1 / (1 - decay)`` updates.
    """

    def init(params: Any) -> AverageState:
        # A copy, so that a step may be given both the parameters and the state to overwrite.
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
    """Return the parameters to evaluate, to export and to generate with.

    Parameters
    ----------
    opt_state : pytree
        The state of an optimizer of `make_optimizer`, as it is or as part of a larger state.
    params : pytree
        The parameters that go with it.

    Returns
    -------
    pytree like `params`
        With ``ema_decay`` the running mean; with schedule_free_adamw the mean x of algorithm 1 of
        Defazio et al. 2024; otherwise, and where a parameter is frozen, `params` as they are.

    Raises
    ------
    ValueError
        When the state keeps several means, so that it is not of one optimizer.

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
        raise ValueError(f"the state keeps {len(states)} means: pass that of one optimizer")
    (state,) = states
    if isinstance(state, AverageState):
        averages = leaves_by_path(state.average)
        return map_with_path(lambda path, param: averages.get(path, param), params)
    x_of = contrib.schedule_free_eval_params  # type: ignore[attr-defined]  # public
    z = leaves_by_path(state.z)
    return map_with_path(
        lambda path, y: x_of(state._replace(z=z[path]), y) if path in z else y, params
    )
