"""Optimizers and schedules that other packages add. Standard library only.

The configuration reads this module without JAX; the functions registered may use it.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from tjx_core import ConfigError, Problem

OPTIMIZER_SETTINGS = ("b1", "b2", "eps", "momentum", "nesterov", "weight_decay")
"""Fields of `OptimizerConfig` whose defaults depend on the optimizer."""

SCHEDULE_SETTINGS = (
    *("decay_steps", "decay_fraction", "final_fraction", "start_fraction"),
    *("cooldown_steps", "cooldown_fraction", "cooldown_shape", "boundaries", "factors"),
)
"""Fields of `ScheduleConfig` that only some schedules use."""


class RegisteredOptimizer(NamedTuple):
    """An optimizer of another package; see `register_optimizer`."""

    make_direction: Callable[[Mapping[str, float | bool]], Any]
    defaults: Mapping[str, float | bool]


class RegisteredSchedule(NamedTuple):
    """A schedule of another package; see `register_schedule`."""

    make_factor: Callable[[Any, Any], Callable[[Any], Any]]
    settings: frozenset[str]


registered_optimizers: dict[str, RegisteredOptimizer] = {}
registered_schedules: dict[str, RegisteredSchedule] = {}


def register_optimizer(
    name: str,
    make_direction: Callable[[Mapping[str, float | bool]], Any],
    *,
    defaults: Mapping[str, float | bool] | None = None,
) -> None:
    """Add an optimizer that `OptimizerConfig` selects by name.

    `make_optimizer` surrounds it with everything that the built-in optimizers have: clipping,
    decoupled weight decay, the learning-rate schedule, parameter groups, the moment dtype and the
    average of the parameters.

    Parameters
    ----------
    name : str
        Value of ``OptimizerConfig.name``. Registering a name again replaces the entry, unless it
        is built in.
    make_direction : callable
        From the settings (those in `defaults`, with the values of the configuration) to an
        ``optax.GradientTransformation`` that turns gradients into directions. The learning rate
        and its minus sign are applied afterwards, as after ``optax.scale_by_adam``.
    defaults : mapping of str to float or bool, optional
        The settings that the optimizer uses (``b1``, ``b2``, ``eps``, ``momentum``, ``nesterov``,
        ``weight_decay``), with their defaults. ``weight_decay`` is 0 if it is not given.

    Raises
    ------
    ConfigError
        If the name is that of a built-in optimizer or a default is no such setting.

    Examples
    --------
    >>> import optax
    >>> from tjx_optim import OptimizerConfig, make_optimizer, register_optimizer
    >>> register_optimizer(
    ...     "rmsprop", lambda s: optax.scale_by_rms(s["b2"], s["eps"]),
    ...     defaults={"b2": 0.99, "eps": 1e-8},
    ... )
    >>> optimizer = make_optimizer(OptimizerConfig(name="rmsprop", b2=0.9))
    """
    from tjx_optim.optimizer_config import DEFAULTS

    settings = {"weight_decay": 0.0, **(defaults or {})}
    problems = _built_in(name, DEFAULTS) + _unknown_settings(settings, OPTIMIZER_SETTINGS)
    if problems:
        raise ConfigError(problems)
    registered_optimizers[name] = RegisteredOptimizer(make_direction, settings)


def register_schedule(
    name: str,
    make_factor: Callable[[Any, Any], Callable[[Any], Any]],
    *,
    settings: Collection[str] = (),
) -> None:
    """Add a schedule that `ScheduleConfig` selects by name.

    `make_schedule` puts the warm-up before it and scales it by the peak learning rate.

    Parameters
    ----------
    name : str
        Value of ``ScheduleConfig.name``. Registering a name again replaces the entry, unless it
        is built in.
    make_factor : callable
        From the `ScheduleConfig` and its `ScheduleSteps` to a function of the step (int32,
        counted from the end of the warm-up) that returns the learning rate as a fraction of the
        peak (float32). It must be traceable by JAX.
    settings : collection of str
        The optional fields of `ScheduleConfig` that the schedule uses, such as
        ``final_fraction``; all others are rejected. With ``decay_steps`` and ``decay_fraction``
        the schedule has an end: ``ScheduleSteps.decay`` and ``ScheduleSteps.end`` are set.

    Raises
    ------
    ConfigError
        If the name is that of a built-in schedule or a setting is no such field.

    Examples
    --------
    >>> from tjx_optim import ScheduleConfig, make_schedule, register_schedule
    >>> register_schedule("halving", lambda config, steps: lambda step: 0.5 ** (step // 100))
    >>> rate = make_schedule(ScheduleConfig(name="halving"), learning_rate=0.4, max_steps=1000)
    >>> rate(150)
    0.2
    """
    from tjx_optim.schedule_config import SCHEDULE_NAMES

    problems = _built_in(name, SCHEDULE_NAMES) + _unknown_settings(settings, SCHEDULE_SETTINGS)
    if problems:
        raise ConfigError(problems)
    registered_schedules[name] = RegisteredSchedule(make_factor, frozenset(settings))


def _built_in(name: str, names: Collection[str]) -> list[Problem]:
    if name not in names:
        return []
    return [Problem("name", f"got {name!r}; expected a name that is not built in; choose another")]


def _unknown_settings(given: Collection[str], allowed: Collection[str]) -> list[Problem]:
    return [
        Problem("settings", f"got {setting!r}; expected some of {', '.join(allowed)}")
        for setting in given
        if setting not in allowed
    ]
