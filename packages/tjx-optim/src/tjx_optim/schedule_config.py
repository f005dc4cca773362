"""Configuration of a learning-rate schedule. Standard library only: it is read without JAX."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise
from typing import Any, Literal, get_args

from tjx_core import ConfigError, Problem, unknown_name
from tjx_optim.registry import registered_schedules

ScheduleName = Literal[
    "constant", "linear", "cosine", "inverse_sqrt", "wsd", "one_cycle", "piecewise"
]
CooldownShape = Literal["linear", "cosine", "sqrt"]

SCHEDULE_NAMES: tuple[str, ...] = get_args(ScheduleName)
_DECAYING = ("linear", "cosine", "wsd", "one_cycle")
# The built-in schedules that use a field; all of them use the name and the warm-up.
SCHEDULES_BY_FIELD: Mapping[str, tuple[str, ...]] = {
    "decay_steps": _DECAYING, "decay_fraction": _DECAYING, "final_fraction": _DECAYING,
    "start_fraction": ("one_cycle",),
    "cooldown_steps": ("wsd",), "cooldown_fraction": ("wsd",), "cooldown_shape": ("wsd",),
    "boundaries": ("piecewise",), "factors": ("piecewise",),
}  # fmt: skip

ONE_CYCLE_WARMUP = 0.3  # of the run; fastai's and PyTorch's default
WSD_COOLDOWN = 0.2  # of the run; Hägele et al., 2024, section 4

STEP_LIMIT = 2**31  # steps are int32


@dataclass(frozen=True, kw_only=True)
class ScheduleSteps:
    """Phase boundaries of a schedule in whole steps; equal numbers give equal schedules.

    Attributes
    ----------
    warmup : int
        Number of warm-up steps, which is also the first step after the warm-up.
    decay : int or None
        First step of the decay; None for schedules without an end.
    end : int or None
        First step at the final rate; None for schedules without an end.
    boundaries : tuple of int
        First step of each piece after the first one.
    """

    warmup: int
    decay: int | None
    end: int | None
    boundaries: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate schedule: a warm-up, then a shape selected by name.

    Fractions are of the whole run and round to the nearest step.

    Attributes
    ----------
    name
        Shape after the warm-up, built in or registered; wsd holds the peak until a cool-down.
    warmup_steps
        Warm-up steps W: step s < W has the rate peak * (s + 1) / (W + 1).
    warmup_fraction
        Warm-up as a fraction of the run; one_cycle defaults to 0.3.
    decay_steps
        Step at which the final rate is reached, warm-up included; none: the end of the run.
    decay_fraction
        End of the decay as a fraction of the run.
    cooldown_steps
        Length of the cool-down of wsd, which ends at decay_steps.
    cooldown_fraction
        Length of the cool-down as a fraction of the run; defaults to 0.2.
    cooldown_shape
        Shape of the cool-down of wsd: linear, cosine, or sqrt (1 - sqrt(progress)).
    boundaries
        Starts of the pieces of piecewise: all in steps (100,200) or all in fractions (0.5,0.8).
    factors
        Rate of each of these pieces as a fraction of the peak; the first piece has the peak.
    final_fraction
        Rate from decay_steps on as a fraction of the peak.
    start_fraction
        First rate of one_cycle as a fraction of the peak.

    Raises
    ------
    ConfigError
        If a value is out of range, the schedule does not use it, or it contradicts others; lists
        all problems.
    """

    name: ScheduleName | str = "cosine"
    warmup_steps: int = 0
    warmup_fraction: float | None = None
    decay_steps: int | None = None
    decay_fraction: float | None = None
    cooldown_steps: int | None = None
    cooldown_fraction: float | None = None
    cooldown_shape: CooldownShape = "linear"
    boundaries: tuple[int | float, ...] = ()
    factors: tuple[float, ...] = ()
    final_fraction: float = 0.1
    start_fraction: float = 0.04

    def __post_init__(self) -> None:
        problems = [
            *_unknown_names(self),
            *_unused_fields(self),
            *_duplicate_lengths(self),
            *_out_of_range(self),
        ]
        # Lengths are compared with each other only if each of them is valid.
        problems = problems or [*_contradicting_lengths(self), *_invalid_pieces(self)]
        if problems:
            raise ConfigError(problems)

    def in_steps(self, max_steps: int) -> ScheduleSteps:
        """Convert all lengths to whole steps of a run.

        A fraction becomes the step nearest to its exact decimal value (halves up). If the run ends
        inside the warm-up (``max_steps <= warmup``), later phases are not checked.

        Parameters
        ----------
        max_steps : int
            Number of steps of the run.

        Returns
        -------
        ScheduleSteps
            The phase boundaries.

        Raises
        ------
        ConfigError
            If `max_steps` is not positive or exceeds int32, or phases overlap in this run.

        Examples
        --------
        >>> config = ScheduleConfig(name="wsd", warmup_steps=10, cooldown_fraction=0.25)
        >>> config.in_steps(200)
        ScheduleSteps(warmup=10, decay=150, end=200, boundaries=())
        """
        if not 1 <= max_steps < STEP_LIMIT:
            message = f"got {max_steps}; expected at least 1 and below 2**31; set the run's length"
            raise ConfigError([Problem("max_steps", message)])
        warmup_fraction, cooldown_fraction = _fractions(self)
        warmup = _length(self.warmup_steps, warmup_fraction, max_steps)
        exact_end = decay = end = None
        if _decays(self):
            exact_end = _length(self.decay_steps or max_steps, self.decay_fraction, max_steps)
            end = _nearest(exact_end)
            # Only the start of the cool-down is rounded, so fractions that fit give steps that fit.
            cooldown = _length(self.cooldown_steps or 0, cooldown_fraction, max_steps)
            decay = _nearest(exact_end - cooldown if self.name == "wsd" else warmup)
        steps = ScheduleSteps(
            warmup=_nearest(warmup),
            decay=decay,
            end=end,
            boundaries=tuple(
                _nearest(_exact(at) * max_steps) if isinstance(at, float) else at
                for at in self.boundaries
            ),
        )
        if max_steps > steps.warmup:
            problems = _overlapping_phases(steps, max_steps)
            if problems:
                raise ConfigError(problems)
        return steps


def _exact(number: float) -> Decimal:
    """Return the decimal value of a float's text: 0.29 of 100 is 29, not 28.999999999999996."""
    return Decimal(repr(float(number)))


def _length(steps: int, fraction: float | None, max_steps: int) -> Decimal:
    return Decimal(steps) if fraction is None else _exact(fraction) * max_steps


def _nearest(length: Decimal) -> int:
    return int(length.to_integral_value(ROUND_HALF_UP))


def _fractions(config: ScheduleConfig) -> tuple[float | None, float | None]:
    """Return warm-up and cool-down as fractions of the run; None if given in steps."""
    warmup, cooldown = config.warmup_fraction, config.cooldown_fraction
    if config.name == "one_cycle" and config.warmup_steps == 0 and warmup is None:
        warmup = ONE_CYCLE_WARMUP
    if config.name == "wsd" and config.cooldown_steps is None and cooldown is None:
        cooldown = WSD_COOLDOWN
    return warmup, cooldown


def schedule_names() -> tuple[str, ...]:
    """Return the names of all schedules, built in and registered.

    Examples
    --------
    >>> schedule_names()[:3]
    ('constant', 'linear', 'cosine')
    """
    return (*SCHEDULE_NAMES, *registered_schedules)


def uses_field(name: str, field: str) -> bool:
    """Return whether a schedule uses a field of `ScheduleConfig`.

    Examples
    --------
    >>> uses_field("wsd", "cooldown_steps"), uses_field("cosine", "cooldown_steps")
    (True, False)
    """
    if field not in SCHEDULES_BY_FIELD:
        return True  # the name and the warm-up
    if name in registered_schedules:
        return field in registered_schedules[name].settings
    return name in SCHEDULES_BY_FIELD[field]


def _decays(config: ScheduleConfig) -> bool:
    return uses_field(config.name, "decay_steps")


def _unknown_names(config: ScheduleConfig) -> list[Problem]:
    choices = {"name": schedule_names(), "cooldown_shape": get_args(CooldownShape)}
    return [
        unknown_name(
            field,
            getattr(config, field),
            allowed,
            register="tjx_optim.register_schedule" if field == "name" else None,
        )
        for field, allowed in choices.items()
        if getattr(config, field) not in allowed
    ]


def _unused_fields(config: ScheduleConfig) -> list[Problem]:
    if config.name not in schedule_names():
        return []
    return [
        Problem(
            field.name,
            f"got {getattr(config, field.name)}; expected {field.default}, since {config.name} "
            f"does not use it (only {', '.join(SCHEDULES_BY_FIELD[field.name])} do); leave it out",
            ("name",),
        )
        for field in fields(config)
        if not uses_field(config.name, field.name) and getattr(config, field.name) != field.default
    ]


def _duplicate_lengths(config: ScheduleConfig) -> list[Problem]:
    problems = []
    for length in ("warmup", "decay", "cooldown"):
        steps, fraction = getattr(config, f"{length}_steps"), getattr(config, f"{length}_fraction")
        if steps and fraction is not None:
            problems.append(
                Problem(
                    f"{length}_steps",
                    f"got {steps}, and {length}_fraction={fraction}; expected one of the two; "
                    "leave one out",
                    (f"{length}_fraction",),
                )
            )
    return problems


def _out_of_range(config: ScheduleConfig) -> list[Problem]:
    lowest_steps = {"warmup_steps": 0, "decay_steps": 1, "cooldown_steps": 1}
    problems = [
        Problem(name, f"got {steps}; expected at least {lowest} and below 2**31 steps")
        for name, lowest in lowest_steps.items()
        if (steps := getattr(config, name)) is not None and not lowest <= steps < STEP_LIMIT
    ]
    ranges: dict[str, tuple[str, Any]] = {
        "warmup_fraction": ("[0, 1); 0.1 is a tenth of the run", lambda x: 0 <= x < 1),
        "decay_fraction": ("(0, 1]; 1 is the end of the run", lambda x: 0 < x <= 1),
        "cooldown_fraction": ("(0, 1]; 0.2 is a fifth of the run", lambda x: 0 < x <= 1),
        "final_fraction": ("[0, 1]; 0.1 ends at a tenth of the peak", lambda x: 0 <= x <= 1),
        "start_fraction": ("[0, 1]; 0.04 starts at a 25th of the peak", lambda x: 0 <= x <= 1),
    }
    problems += [
        Problem(name, f"got {value}; expected {allowed}")
        for name, (allowed, lies_in) in ranges.items()
        if (value := getattr(config, name)) is not None and not lies_in(value)
    ]
    problems += [
        Problem(
            "boundaries",
            f"got {at}; expected a step of at least 1 (and below 2**31), such as 100, or a "
            "fraction of the run in (0, 1), such as 0.5",
        )
        for at in config.boundaries
        if not (0 < at < 1 if isinstance(at, float) else 1 <= at < STEP_LIMIT)
    ]
    problems += [
        Problem("factors", f"got {factor}; expected [0, 1]; 0.1 is a tenth of the peak")
        for factor in config.factors
        if not 0 <= factor <= 1
    ]
    return problems


def _contradicting_lengths(config: ScheduleConfig) -> list[Problem]:
    """Report lengths that fit no run: all of them in steps, or all in fractions."""
    if not _decays(config):
        return []
    warmup, cooldown = _fractions(config)
    if config.decay_steps is not None:
        return [] if warmup is not None else _contradicting_steps(config, config.decay_steps)
    end = 1.0 if config.decay_fraction is None else config.decay_fraction
    if _exact(warmup or 0.0) >= _exact(end):
        return [
            Problem(
                "decay_fraction",
                f"got {end}; expected more than warmup_fraction={warmup}, which it includes; "
                "raise it or shorten the warm-up",
                ("warmup_fraction",),
            )
        ]
    if cooldown is not None and _exact(warmup or 0.0) + _exact(cooldown) > _exact(end):
        return [
            Problem(
                "cooldown_fraction",
                f"got {cooldown}; expected at most {end} of the run together with the warm-up "
                f"({warmup or 0.0} of the run); shorten one of them",
                ("warmup_fraction", "decay_fraction"),
            )
        ]
    return []


def _contradicting_steps(config: ScheduleConfig, decay_steps: int) -> list[Problem]:
    left = decay_steps - config.warmup_steps
    if left <= 0:
        return [
            Problem(
                "decay_steps",
                f"got {decay_steps}; expected more than warmup_steps={config.warmup_steps}, which "
                "it includes; raise it, or leave it out to decay until the end of the run",
                ("warmup_steps",),
            )
        ]
    if config.cooldown_steps is not None and config.cooldown_steps > left:
        return [
            Problem(
                "cooldown_steps",
                f"got {config.cooldown_steps}; expected at most the {left} steps from "
                f"warmup_steps={config.warmup_steps} to decay_steps={decay_steps}; shorten it or "
                "the warm-up",
                ("warmup_steps", "decay_steps"),
            )
        ]
    return []


def _invalid_pieces(config: ScheduleConfig) -> list[Problem]:
    if not uses_field(config.name, "boundaries"):
        return []
    at, factors = config.boundaries, config.factors
    if not at:
        return [Problem("boundaries", f"got (); expected some for {config.name}; try 0.5,0.8")]
    problems = []
    if len(factors) != len(at):
        problems.append(
            Problem(
                "factors",
                f"got {factors}; expected {len(at)} of them, one for each of boundaries={at}; the "
                "piece before the first boundary has the peak",
                ("boundaries",),
            )
        )
    related: tuple[str, ...] = ()
    wrong = ""
    if len({isinstance(boundary, float) for boundary in at}) > 1:
        wrong = "expected all in steps or all in fractions; use one kind"
    elif any(first >= second for first, second in pairwise(at)):
        wrong = "expected increasing values; sort them and remove duplicates"
    elif isinstance(at[0], float) and at[0] < (config.warmup_fraction or 0):
        related = ("warmup_fraction",)
        wrong = f"expected at least warmup_fraction={config.warmup_fraction}"
    elif isinstance(at[0], int) and at[0] <= config.warmup_steps:
        related = ("warmup_steps",)
        wrong = f"expected more than warmup_steps={config.warmup_steps}"
    if related:
        wrong += "; raise the first or shorten the warm-up"
    return problems + ([Problem("boundaries", f"got {at}; {wrong}", related)] if wrong else [])


def _overlapping_phases(steps: ScheduleSteps, max_steps: int) -> list[Problem]:
    """Report phases that overlap after conversion to the steps of a run."""
    run = f"in a run of max_steps={max_steps}"
    if steps.end is not None and steps.end <= steps.warmup:
        return [
            Problem(
                "decay_steps",
                f"got step {steps.end} as the end of the decay {run}; expected more than the "
                f"{steps.warmup} steps of the warm-up; shorten the warm-up or decay later",
            )
        ]
    if steps.end is not None and steps.decay is not None and steps.decay < steps.warmup:
        return [
            Problem(
                "cooldown_steps",
                f"got {steps.end - steps.decay} steps {run}; expected at most the "
                f"{steps.end - steps.warmup} after the warm-up; shorten it or the warm-up",
            )
        ]
    if steps.boundaries and steps.boundaries[0] < steps.warmup:
        return [
            Problem(
                "boundaries",
                f"got step {steps.boundaries[0]} as the first {run}; expected at least step "
                f"{steps.warmup}, the end of the warm-up; raise it or shorten the warm-up",
            )
        ]
    return []
