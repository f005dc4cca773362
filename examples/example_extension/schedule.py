"""A learning-rate schedule: cosines with warm restarts (Loshchilov and Hutter 2017)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tjx_optim import ScheduleConfig, ScheduleSteps, register_schedule

PERIOD = 10  # steps


def make_factor(_: ScheduleConfig, __: ScheduleSteps) -> Callable[[jax.Array], jax.Array]:
    """Return the fraction of the peak learning rate at a step after the warm-up."""
    return lambda step: 0.5 + 0.5 * jnp.cos(jnp.pi * (step % PERIOD) / PERIOD)


register_schedule(__name__, make_factor)
