"""A learning-rate schedule: the inverse square root of the step (Vaswani et al. 2017)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tjx_optim import ScheduleConfig, ScheduleSteps, register_schedule


def make_factor(_: ScheduleConfig, steps: ScheduleSteps) -> Callable[[jax.Array], jax.Array]:
    """Return the fraction of the peak learning rate at a step after the warm-up."""
    warmup = max(steps.warmup, 1)
    return lambda step: jnp.sqrt(warmup / (warmup + step))


register_schedule(__name__, make_factor)
