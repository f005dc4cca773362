"""Learning-rate schedules: a table from name to shape, with a common warm-up.

Steps count from 0, with nanoGPT's conventions. With peak rate L and W warm-up steps, step s < W has
the rate ``L * (s + 1) / (W + 1)``: never 0, and step W is the first at the peak. A decay that ends
at step D (``decay_steps``, which includes the warm-up; by default the length of the run) has the
rate ``final_fraction * L`` from step D on, so the last step of a run is one step before it.

Ramps are computed from integer numbers of completed or remaining steps. ``1 - s / T`` in float32,
as in optax's ramps, is 1 % off in the first steps of a warm-up of 10^6 steps and has no correct
digit in the last steps of a cosine to 0. Here each rate has float32's relative precision.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from tjx_core import ConfigError, Problem
from tjx_optim.registry import registered_schedules
from tjx_optim.schedule_config import ScheduleConfig, ScheduleSteps

# Makes a schedule of the rate as a fraction of the peak, by step from the end of the warm-up.
Shape = Callable[[ScheduleConfig, ScheduleSteps], optax.Schedule]
# From the completed and remaining fractions of a ramp (float32 in [0, 1]) to its height in [0, 1].
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
    """Return a ramp from 1 to `bottom` over `length` steps, or from `bottom` to 1."""

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
    """Hold the peak until the decay starts (for all but wsd after the warm-up), then decay."""

    def shape_of(config: ScheduleConfig, steps: ScheduleSteps) -> optax.Schedule:
        assert steps.decay is not None
        assert steps.end is not None
        length, final = steps.end - steps.decay, config.final_fraction
        # The decay has no steps if the run ends inside the warm-up or its fraction rounds to 0.
        fall = _ramp(shape, length, final) if length > 0 else optax.constant_schedule(final)
        peak = optax.constant_schedule(1.0)
        return optax.join_schedules([peak, fall], [steps.decay - steps.warmup])

    return shape_of


def _wsd(config: ScheduleConfig, steps: ScheduleSteps) -> optax.Schedule:
    return _decay(config.cooldown_shape)(config, steps)


def _inverse_sqrt(config: ScheduleConfig, steps: ScheduleSteps) -> optax.Schedule:
    """Decay with the inverse root of the step; the paper counts steps and warm-up from 1."""
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
"""The built-in schedules by name; `register_schedule` adds others."""


def _warm_up(config: ScheduleConfig, warmup: int) -> optax.Schedule:
    if config.name == "one_cycle":
        return _ramp("cosine", warmup, config.start_fraction, rises=True)
    return lambda step: (step + 1) / (warmup + 1)


def make_schedule(
    config: ScheduleConfig, *, learning_rate: float, max_steps: int
) -> Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]:
    """Make the learning rate as a function of the step.

    A run that ends inside the warm-up (``max_steps <= warmup_steps``) has the warm-up rates of a
    longer run and no decay.

    Parameters
    ----------
    config : ScheduleConfig
        Shape, warm-up and end.
    learning_rate : float
        Peak learning rate.
    max_steps : int
        Number of steps of the run; fractions refer to it, and it is the default end of a decay.

    Returns
    -------
    callable
        From a step (int, or int32, traced or not) to the learning rate (float32 scalar under
        ``jax.jit``), within float32's relative precision at any step below 2**31.

    Raises
    ------
    ConfigError
        If `max_steps` is not positive, `learning_rate` is negative or not finite, or phases
        overlap in this run.

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
    >>> cosine = ScheduleConfig(name="cosine", warmup_steps=3)
    >>> rate = jax.jit(jax.vmap(make_schedule(cosine, learning_rate=1.0, max_steps=13)))
    >>> print(np.asarray(rate(jax.device_put(np.array([0, 2, 3, 8, 13, 99])))).round(3))
    [0.25 0.75 1.   0.55 0.1  0.1 ]
    """
    if not (math.isfinite(learning_rate) and learning_rate >= 0):
        message = f"got {learning_rate}; expected a finite number of at least 0; set the peak"
        raise ConfigError([Problem("learning_rate", message)])
    steps = config.in_steps(max_steps)
    if config.name in registered_schedules:
        factor = registered_schedules[config.name].make_factor(config, steps)
    else:
        factor = SCHEDULES[config.name](config, steps)
    if steps.warmup > 0:
        factor = optax.join_schedules([_warm_up(config, steps.warmup), factor], [steps.warmup])

    def rate(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        value: jax.typing.ArrayLike = learning_rate * factor(step)
        return value

    return rate
