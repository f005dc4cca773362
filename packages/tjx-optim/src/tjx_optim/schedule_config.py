"""What configures a schedule, and where it turns. Standard library only: it is read without JAX."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise
from typing import Any, Literal, get_args

from tjx_optim.refusals import unknown_name

ScheduleName = Literal[
    "constant", "linear", "cosine", "inverse_sqrt", "wsd", "one_cycle", "piecewise"
]
CooldownShape = Literal["linear", "cosine", "sqrt"]

_ENDING = ("linear", "cosine", "wsd", "one_cycle")
# The schedules that heed a field; name and warm-up are for all.
SCHEDULES_BY_FIELD: Mapping[str, tuple[str, ...]] = {
    "decay_steps": _ENDING, "decay_fraction": _ENDING, "final_fraction": _ENDING,
    "start_fraction": ("one_cycle",),
    "cooldown_steps": ("wsd",), "cooldown_fraction": ("wsd",), "cooldown_shape": ("wsd",),
    "boundaries": ("piecewise",), "factors": ("piecewise",),
}  # fmt: skip

ONE_CYCLE_RISE = 0.3  # of the run; fastai's and PyTorch's default
WSD_COOLDOWN = 0.2  # of the run; Hägele et al., 2024, section 4

STEP_LIMIT = 2**31  # steps are int32


@dataclass(frozen=True, kw_only=True)
class ScheduleSteps:
    """Where a schedule turns, in whole steps: the same numbers are the same schedule.

    Attributes
    ----------
    warmup : int
        Steps of the warm-up, and so the first step after it.
    decay : int or None
        Step from which the rate falls, down to its end; None where it does not end.
    end : int or None
        First step at the final rate; None where there is none.
    boundaries : tuple of int
        First step of each piece after the first one.
    """

    warmup: int
    decay: int | None
    end: int | None
    boundaries: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps: a warm-up, then a shape by name.

    Fractions are of the whole run, and give the nearest whole step.

    Attributes
    ----------
    name
        Shape after the warm-up; wsd holds the peak until a cool-down at the end.
    warmup_steps
        Steps of warm-up: step s < W has peak * (s + 1) / (W + 1); for one_cycle its rise.
    warmup_fraction
        The same as a fraction of the run; with neither, one_cycle rises for 0.3 of it.
    decay_steps
        Step at which the final rate is reached, warm-up included; none is the end of the run.
    decay_fraction
        The same as a fraction of the run.
    cooldown_steps
        Steps that wsd falls for, up to decay_steps.
    cooldown_fraction
        The same as a fraction of the run; with neither it is 0.2.
    cooldown_shape
        How wsd falls: linear, cosine, or sqrt (1 minus the root of what is done of it).
    boundaries
        Where the pieces of piecewise begin: all in steps (100,200) or all in fractions (0.5,0.8).
    factors
        Rate of each of these pieces, as a fraction of the peak; the first piece has the peak.
    final_fraction
        Rate from decay_steps on, as a fraction of the peak.
    start_fraction
        Rate that one_cycle rises from, as a fraction of the peak.

    Raises
    ------
    ValueError
        When a value is out of its range, is not heeded by the schedule, or does not fit the
        others; all of them are named at once.
    """

    name: ScheduleName = "cosine"
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
        problems = [*_unknown(self), *_unheeded(self), *_given_twice(self), *_out_of_range(self)]
        # Whether lengths fit each other is a question only once each of them can be one.
        problems = problems or [*_misfits(self), *_wrong_pieces(self)]
        if problems:
            raise ValueError("\n".join(problems))

    def in_steps(self, max_steps: int) -> ScheduleSteps:
        """Turn every length into whole steps of a run.

        A fraction becomes the nearest step (halves up) to its exact decimal value. Where a run
        ends inside its own warm-up (``max_steps <= warmup``), nothing after that is looked at.

        Parameters
        ----------
        max_steps : int
            Steps of the whole run.

        Returns
        -------
        ScheduleSteps
            Where the schedule turns.

        Raises
        ------
        ValueError
            When `max_steps` is not positive or no int32, or a length does not fit into the run.

        Examples
        --------
        >>> config = ScheduleConfig(name="wsd", warmup_steps=10, cooldown_fraction=0.25)
        >>> config.in_steps(200)
        ScheduleSteps(warmup=10, decay=150, end=200, boundaries=())
        """
        if not 1 <= max_steps < STEP_LIMIT:
            raise ValueError(
                f"max_steps={max_steps}: must be at least 1 and below 2**31; set the length of the "
                "run"
            )
        warmup_part, cooldown_part = _fractions(self)
        warmup = _length(self.warmup_steps, warmup_part, max_steps)
        exact_end = decay = end = None
        if self.name in _ENDING:
            exact_end = _length(self.decay_steps or max_steps, self.decay_fraction, max_steps)
            end = _nearest(exact_end)
            # Rounded once, as the step where it begins: fractions that fit give steps that fit.
            cooldown = _length(self.cooldown_steps or 0, cooldown_part, max_steps)
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
            problems = _overlaps(steps, max_steps)
            if problems:
                raise ValueError("\n".join(problems))
        return steps


def _exact(number: float) -> Decimal:
    """Return a number as it was written: 0.29 of 100 steps are 29, not 28.999999999999996."""
    return Decimal(repr(float(number)))


def _length(steps: int, fraction: float | None, max_steps: int) -> Decimal:
    return Decimal(steps) if fraction is None else _exact(fraction) * max_steps


def _nearest(length: Decimal) -> int:
    return int(length.to_integral_value(ROUND_HALF_UP))


def _fractions(config: ScheduleConfig) -> tuple[float | None, float | None]:
    """Return warm-up and cool-down as fractions of the run, None where they are in steps."""
    warmup, cooldown = config.warmup_fraction, config.cooldown_fraction
    if config.name == "one_cycle" and config.warmup_steps == 0 and warmup is None:
        warmup = ONE_CYCLE_RISE
    if config.name == "wsd" and config.cooldown_steps is None and cooldown is None:
        cooldown = WSD_COOLDOWN
    return warmup, cooldown


def _unknown(config: ScheduleConfig) -> list[str]:
    choices = {"name": get_args(ScheduleName), "cooldown_shape": get_args(CooldownShape)}
    return [
        unknown_name(field, getattr(config, field), allowed)
        for field, allowed in choices.items()
        if getattr(config, field) not in allowed
    ]


def _unheeded(config: ScheduleConfig) -> list[str]:
    if config.name not in get_args(ScheduleName):
        return []
    return [
        f"{field.name}={getattr(config, field.name)}: is not heeded by name={config.name}, only by "
        f"{', '.join(SCHEDULES_BY_FIELD[field.name])}; leave it out, or at {field.default}"
        for field in fields(config)
        if config.name not in SCHEDULES_BY_FIELD.get(field.name, (config.name,))
        and getattr(config, field.name) != field.default
    ]


def _given_twice(config: ScheduleConfig) -> list[str]:
    problems = []
    for length in ("warmup", "decay", "cooldown"):
        steps, part = getattr(config, f"{length}_steps"), getattr(config, f"{length}_fraction")
        if steps and part is not None:
            problems.append(
                f"{length}_steps={steps} and {length}_fraction={part}: one length is given twice; "
                "leave one of them out"
            )
    return problems


def _out_of_range(config: ScheduleConfig) -> list[str]:
    lowest_steps = {"warmup_steps": 0, "decay_steps": 1, "cooldown_steps": 1}
    problems = [
        f"{name}={steps}: must be at least {lowest} and below 2**31; give a number of steps"
        for name, lowest in lowest_steps.items()
        if (steps := getattr(config, name)) is not None and not lowest <= steps < STEP_LIMIT
    ]
    ranges: dict[str, tuple[str, Any]] = {
        "warmup_fraction": ("[0, 1); 0.1 is a tenth of the run", lambda x: 0 <= x < 1),
        "decay_fraction": ("(0, 1]; 1 is the end of the run", lambda x: 0 < x <= 1),
        "cooldown_fraction": ("(0, 1]; 0.2 is a fifth of the run", lambda x: 0 < x <= 1),
        "final_fraction": ("[0, 1]; 0.1 ends at a tenth", lambda x: 0 <= x <= 1),
        "start_fraction": ("[0, 1]; 0.04 starts at a 25th", lambda x: 0 <= x <= 1),
    }
    problems += [
        f"{name}={value}: must lie in {allowed}"
        for name, (allowed, lies_in) in ranges.items()
        if (value := getattr(config, name)) is not None and not lies_in(value)
    ]
    problems += [
        f"boundaries={at}: must be a step of at least 1 (and below 2**31), as in 100, or a "
        "fraction of the run in (0, 1), as in 0.5"
        for at in config.boundaries
        if not (0 < at < 1 if isinstance(at, float) else 1 <= at < STEP_LIMIT)
    ]
    problems += [
        f"factors={factor}: must lie in [0, 1]; 0.1 is a tenth of the peak"
        for factor in config.factors
        if not 0 <= factor <= 1
    ]
    return problems


def _misfits(config: ScheduleConfig) -> list[str]:
    """Find lengths that fit no run whatever: all of them in steps, or all in fractions."""
    if config.name not in _ENDING:
        return []
    problems = []
    warmup, cooldown = _fractions(config)
    if config.decay_steps is not None and warmup is None:
        left = config.decay_steps - config.warmup_steps
        if left <= 0:
            problems.append(
                f"decay_steps={config.decay_steps}: includes the warm-up, so it must be above "
                f"warmup_steps={config.warmup_steps}; raise it, or leave it out to decay to the end"
            )
        elif config.cooldown_steps is not None and config.cooldown_steps > left:
            problems.append(
                f"cooldown_steps={config.cooldown_steps}: must be at most the {left} steps from "
                f"warmup_steps={config.warmup_steps} to decay_steps={config.decay_steps}; "
                "shorten it or the warm-up"
            )
    if config.decay_steps is None:
        end = 1.0 if config.decay_fraction is None else config.decay_fraction
        if _exact(warmup or 0.0) >= _exact(end):
            problems.append(
                f"decay_fraction={end}: includes the warm-up, so it must be above "
                f"warmup_fraction={warmup}; raise it, or shorten the warm-up"
            )
        elif cooldown is not None and _exact(warmup or 0.0) + _exact(cooldown) > _exact(end):
            problems.append(
                f"cooldown_fraction={cooldown}: warm-up ({warmup or 0.0} of the run) and cool-down "
                f"must fit into {end} of the run; shorten one of them"
            )
    return problems


def _wrong_pieces(config: ScheduleConfig) -> list[str]:
    if config.name != "piecewise":
        return []
    at, factors = config.boundaries, config.factors
    if not at:
        return ["boundaries=(): piecewise needs some, and a factor for each; give 0.5,0.8"]
    problems = []
    if len(factors) != len(at):
        problems.append(
            f"factors={factors}: must be as many as boundaries={at}, {len(at)} and not "
            f"{len(factors)}; the piece before the first boundary has the peak"
        )
    if len({isinstance(boundary, float) for boundary in at}) > 1:
        problems.append(f"boundaries={at}: must be all in steps or all in fractions; give one kind")
    elif any(first >= second for first, second in pairwise(at)):
        problems.append(f"boundaries={at}: must increase; sort them and leave out what is twice")
    elif isinstance(at[0], float) and at[0] < (config.warmup_fraction or 0):
        problems.append(
            f"boundaries={at}: must not lie in the warm-up, warmup_fraction="
            f"{config.warmup_fraction}; raise the first, or shorten the warm-up"
        )
    elif isinstance(at[0], int) and at[0] <= config.warmup_steps:
        problems.append(
            f"boundaries={at}: must be above warmup_steps={config.warmup_steps}; raise the first, "
            "or shorten the warm-up"
        )
    return problems


def _overlaps(steps: ScheduleSteps, max_steps: int) -> list[str]:
    """Find parts of a schedule that overlap once they are steps of one run."""
    run = f"in a run of max_steps={max_steps}"
    if steps.end is not None and steps.end <= steps.warmup:
        return [
            f"decay_steps: {run} the decay ends at step {steps.end} and the warm-up at step "
            f"{steps.warmup}; shorten the warm-up (of one_cycle: its rise), or end later"
        ]
    if steps.end is not None and steps.decay is not None and steps.decay < steps.warmup:
        return [
            f"cooldown_steps: {run} the cool-down takes {steps.end - steps.decay} steps and "
            f"{steps.end - steps.warmup} are left after the warm-up; shorten it or the warm-up"
        ]
    if steps.boundaries and steps.boundaries[0] < steps.warmup:
        return [
            f"boundaries: {run} the first is step {steps.boundaries[0]} and the warm-up ends at "
            f"step {steps.warmup}; raise the first, or shorten the warm-up"
        ]
    return []
