"""Learning-rate schedules: a table from name to shape, and one warm-up before all of them.

Steps count from 0, and the conventions are nanoGPT's. With peak rate L and W warm-up steps, step
s < W has ``L * (s + 1) / (W + 1)``: never 0, and step W is the first one at the peak. A decay that
is done at step D (``decay_steps``, warm-up included; else the length of the run) is at
``final_fraction * L`` from step D on, so the last step of a run is one step short of it.

A ramp is computed from the whole steps that are left of it or done: ``1 - s / T`` in float32, as
optax's own ramps have it, is 1 % off in the first steps of a warm-up of 10^6 and wrong in every
digit in the last ones of a cosine to 0. So each rate has float32's relative precision.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from tjx_optim.schedule_config import ScheduleConfig, ScheduleSteps

# The rate as a fraction of the peak, at each step counted from the end of the warm-up.
Shape = Callable[[ScheduleConfig, ScheduleSteps], optax.Schedule]
# From the fractions of a ramp that are done and left (float32, 0 to 1) to its height (0 to 1).
Ramp = Callable[[jax.Array, jax.Array], jax.Array]


def _linear(done: jax.Array, left: jax.Array) -> jax.Array:
    del done
    return left


def _cosine(done: jax.Array, left: jax.Array) -> jax.Array:
    del done
    return jnp.sin(jnp.pi / 2 * left) ** 2  # (1 + cos(pi * done)) / 2 without its cancellation


def _sqrt(done: jax.Array, left: jax.Array) -> jax.Array:
    return left / (1 + jnp.sqrt(done))  # 1 - sqrt(done) without its cancellation


RAMPS: Mapping[str, Ramp] = {"linear": _linear, "cosine": _cosine, "sqrt": _sqrt}


def _ramp(shape: str, length: int, bottom: float, *, rises: bool = False) -> optax.Schedule:
    """Go from 1 to `bottom` in `length` steps and stay there, or from `bottom` to 1."""

    def factor(step: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.clip(step, 0, length) / length
        left = jnp.clip(length - step, 0, length) / length
        height = RAMPS[shape](*((left, done) if rises else (done, left)))
        return bottom + (1 - bottom) * height

    return factor


def _constant(config: ScheduleConfig, steps: ScheduleSteps) -> optax.Schedule:
    del config, steps
    return optax.constant_schedule(1.0)


def _decay(shape: str) -> Shape:
    """Hold the peak until the decay begins (with the warm-up's end, but for wsd); then fall."""

    def shape_of(config: ScheduleConfig, steps: ScheduleSteps) -> optax.Schedule:
        assert steps.decay is not None
        assert steps.end is not None
        length, final = steps.end - steps.decay, config.final_fraction
        # Of no step where a run ends inside its warm-up, or a fraction of it is none.
        fall = _ramp(shape, length, final) if length > 0 else optax.constant_schedule(final)
        peak = optax.constant_schedule(1.0)
        return optax.join_schedules([peak, fall], [steps.decay - steps.warmup])

    return shape_of


def _wsd(config: ScheduleConfig, steps: ScheduleSteps) -> optax.Schedule:
    return _decay(config.cooldown_shape)(config, steps)


def _inverse_sqrt(config: ScheduleConfig, steps: ScheduleSteps) -> optax.Schedule:
    """Fall with the root of the step; the paper counts steps and their warm-up from 1."""
    del config
    first = steps.warmup + 1
    return lambda step: jnp.sqrt(first / jnp.maximum(first + step, 1))


def _piecewise(config: ScheduleConfig, steps: ScheduleSteps) -> optax.Schedule:
    pieces = [optax.constant_schedule(factor) for factor in (1.0, *config.factors)]
    return optax.join_schedules(pieces, [at - steps.warmup for at in steps.boundaries])


SCHEDULES: Mapping[str, Shape] = {
    "constant": _constant,
    "linear": _decay("linear"),
    "cosine": _decay("cosine"),
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
    "one_cycle": _decay("cosine"),
    "piecewise": _piecewise,
}


def _warm_up(config: ScheduleConfig, warmup: int) -> optax.Schedule:
    if config.name == "one_cycle":
        return _ramp("cosine", warmup, config.start_fraction, rises=True)
    return lambda step: (step + 1) / (warmup + 1)


def make_schedule(
    config: ScheduleConfig, *, learning_rate: float, max_steps: int
) -> Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]:
    """Make the learning rate as a function of the step.

    A run that ends inside its own warm-up (``max_steps <= warmup_steps``) only warms up, at the
    same rates as a longer run; it has no step left to decay in.

    Parameters
    ----------
    config : ScheduleConfig
        The shape, its warm-up and its end.
    learning_rate : float
        Peak learning rate.
    max_steps : int
        Steps of the whole run: what fractions are of, and the end of the decay where the
        configuration names none.

    Returns
    -------
    callable
        From a step (int, or int32, traced or not) to the learning rate (float32 scalar under
        ``jax.jit``), within float32's relative precision at any step below 2**31.

    Raises
    ------
    ValueError
        When `max_steps` is not positive, `learning_rate` is negative or not finite, or a length
        does not fit into the run.

    References
    ----------
    Warm-up: nanoGPT, ``train.py``, ``get_lr``. Cosine: Loshchilov and Hutter, "SGDR", 2017,
    section 3, one period. Inverse square root: Vaswani et al., "Attention is all you need", 2017,
    section 5.3, with its warm-up of W + 1 steps: ``L * sqrt((W + 1) / (s + 1))`` from step W on.
    WSD: Hu et al., "MiniCPM", 2024, section 4; the shape sqrt: Hägele et al., "Scaling laws and
    compute-optimal training beyond fixed training durations", 2024, section 3. One cycle: Smith and
    Topin, "Super-convergence", 2018, section 3, with cosines for lines as in fastai.

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
    if not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise ValueError(
            f"learning_rate={learning_rate}: must be a finite number of at least 0; give the peak"
        )
    steps = config.in_steps(max_steps)
    factor = SCHEDULES[config.name](config, steps)
    if steps.warmup > 0:
        factor = optax.join_schedules([_warm_up(config, steps.warmup), factor], [steps.warmup])
    return lambda step: learning_rate * factor(step)


def learning_rates(
    config: ScheduleConfig,
    *,
    learning_rate: float,
    max_steps: int,
    steps: npt.NDArray[np.integer] | None = None,
) -> npt.NDArray[np.float32]:
    """Compute the learning rate of many steps at once, for tables and pictures.

    Parameters
    ----------
    config, learning_rate, max_steps
        As for `make_schedule`.
    steps : integer array [n] or None
        The steps, below 2**31; None for all of the run, 0 to ``max_steps - 1``.

    Returns
    -------
    float32 array [n]
        The rate of each step, the very numbers that training takes.

    Examples
    --------
    >>> config = ScheduleConfig(name="piecewise", boundaries=(0.5, 0.75), factors=(0.5, 0.25))
    >>> print(learning_rates(config, learning_rate=4.0, max_steps=8))
    [4. 4. 4. 4. 2. 2. 1. 1.]
    """
    schedule = make_schedule(config, learning_rate=learning_rate, max_steps=max_steps)
    wanted = np.arange(max_steps) if steps is None else steps
    rates = jax.jit(jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32)))
    return np.asarray(jax.device_get(rates(jax.device_put(wanted.astype(np.int32)))))
