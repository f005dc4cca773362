"""Learning-rate schedules: a table from name to shape, and one warm-up for all of them.

The conventions are nanoGPT's. Step s counts from 0. With peak rate L and W warm-up steps, step
s < W has ``L * (s + 1) / (W + 1)``: never 0, and step W is the first one at the peak. The decay
runs from step W to step D = ``decay_steps``, which counts the warm-up; from step D on the rate
stays at ``final_fraction * L``.
"""

from collections.abc import Callable, Mapping

import jax
import optax

from tjx_optim.schedule_config import ScheduleConfig

# From (peak rate, steps of decay, final fraction) to the rate at each step after the warm-up.
Shape = Callable[[float, int, float], optax.Schedule]


def _cosine(peak: float, decay_steps: int, final_fraction: float) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, decay_steps, alpha=final_fraction)


def _linear(peak: float, decay_steps: int, final_fraction: float) -> optax.Schedule:
    return optax.linear_schedule(peak, peak * final_fraction, decay_steps)


def _constant(peak: float, decay_steps: int, final_fraction: float) -> optax.Schedule:
    del decay_steps, final_fraction
    return optax.constant_schedule(peak)


SCHEDULES: Mapping[str, Shape] = {"cosine": _cosine, "linear": _linear, "constant": _constant}


def make_schedule(
    config: ScheduleConfig, *, learning_rate: float, max_steps: int
) -> Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]:
    """Make the learning rate as a function of the step.

    A run that ends inside its own warm-up (``max_steps <= warmup_steps``, with ``decay_steps``
    left out) only warms up, at the same rates as a longer run; it has no step left to decay in.

    Parameters
    ----------
    config : ScheduleConfig
        The shape, its warm-up and its end.
    learning_rate : float
        Peak learning rate.
    max_steps : int
        Steps of the whole run; the end of the decay where ``config.decay_steps`` is None.

    Returns
    -------
    callable
        From a step (int, or int32 scalar, traced or not) to the learning rate (float32 scalar
        under ``jax.jit``).

    Raises
    ------
    ValueError
        When `max_steps` is not positive.

    References
    ----------
    Cosine: Loshchilov and Hutter, "SGDR", 2017, section 3, one period. Warm-up: nanoGPT,
    ``train.py``, ``get_lr``.

    Examples
    --------
    >>> import jax, numpy as np
    >>> from tjx_optim import ScheduleConfig, make_schedule
    >>> rate = make_schedule(
    ...     ScheduleConfig(name="linear", warmup_steps=3), learning_rate=1.0, max_steps=13
    ... )
    >>> steps = jax.device_put(np.array([0, 2, 3, 8, 13, 99]))
    >>> print(np.asarray(jax.jit(jax.vmap(rate))(steps)).round(3))
    [0.25 0.75 1.   0.55 0.1  0.1 ]
    """
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}: must be at least 1; set the length of the run")
    warmup = config.warmup_steps
    end = max_steps if config.decay_steps is None else config.decay_steps
    if end > warmup:
        shape = SCHEDULES[config.name](learning_rate, end - warmup, config.final_fraction)
    else:
        # Only where decay_steps was left out: the configuration refuses it otherwise.
        shape = optax.constant_schedule(learning_rate)
    if warmup == 0:
        return shape
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
    return optax.join_schedules([rise, shape], [warmup])
