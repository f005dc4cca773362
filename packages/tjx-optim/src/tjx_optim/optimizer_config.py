"""Configuration of an optimizer. Standard library only, so that it is read without JAX."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from tjx_core import ConfigError, Problem, problems_of, unknown_name
from tjx_optim.param_groups import ParameterGroup, parse_group
from tjx_optim.registry import registered_optimizers

OptimizerName = Literal[
    "sgd",
    "adam",
    "adamw",
    "lamb",
    "lion",
    "adafactor",
    "muon",
    "dion",
    "soap",
    "schedule_free_adamw",
]
MomentDtype = Literal["float32", "bfloat16"]

DEFAULTS: Mapping[str, Mapping[str, float | bool]] = {
    # He et al. 2016, section 3.4; with momentum, decoupled and coupled decay nearly agree.
    "sgd": {"momentum": 0.9, "nesterov": False, "weight_decay": 1e-4},
    # Kingma and Ba 2015, algorithm 1.
    "adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
    # Loshchilov and Hutter 2019; the values of GPT-3 (Brown et al. 2020) and nanoGPT.
    "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
    # You et al. 2020, section 4.
    "lamb": {"b1": 0.9, "b2": 0.999, "eps": 1e-6, "weight_decay": 0.01},
    # Chen et al. 2023, algorithm 2.
    "lion": {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1},
    # Shazeer and Stern 2018, algorithm 4: b2 is the exponent of the decay rate 1 - t^-b2.
    "adafactor": {"b1": 0.0, "b2": 0.8, "eps": 1e-30, "weight_decay": 0.0},
    # Liu et al. 2025, section 2; b1, b2 and eps are those of AdamW for the other parameters.
    "muon": {
        "momentum": 0.95,
        "nesterov": True,
        "polar_express": False,
        "neuron_b2": 0.0,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
    },
    # Ahn et al. 2025, algorithm 1; b1, b2 and eps are those of AdamW for the other parameters.
    "dion": {
        "momentum": 0.95,
        "rank_fraction": 0.25,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
    },
    # Vyas et al. 2024, section 5.
    "soap": {"b1": 0.95, "b2": 0.95, "eps": 1e-8, "precondition_every": 10, "weight_decay": 1e-4},
    # Defazio et al. 2024, algorithm 1; b1 interpolates between the averaged and the base iterate.
    "schedule_free_adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
}
"""Settings that each built-in optimizer uses, with their defaults."""

SETTINGS = tuple(dict.fromkeys(field for used in DEFAULTS.values() for field in used))
"""Fields of `OptimizerConfig` whose defaults are those of the optimizer."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, learning rate, weight decay, clipping and parameter groups.

    Attributes
    ----------
    name
        Optimizer, built in or registered; it decides the defaults of the settings below.
    learning_rate
        Peak learning rate; the schedule scales it.
    weight_decay
        Decay per step and unit of learning rate (adam: L2); never of biases and norm scales.
    b1
        Decay rate of the first moment (lion: mixing rate), in [0, 1); schedule-free: in (0, 1).
    b2
        Decay rate of the second moment (lion: momentum), in [0, 1); adafactor: exponent, (0, 1).
    eps
        Added to the root of the second moment (adafactor: to the squared gradient).
    momentum
        Momentum of sgd and of the matrices of muon and dion, in [0, 1).
    nesterov
        Whether that momentum is Nesterov's.
    polar_express
        Whether muon's polynomials are those of Polar Express, which are more accurate.
    neuron_b2
        Decay rate of a second moment of each neuron of muon (NorMuon), in [0, 1); 0: none.
    rank_fraction
        Rank of dion's updates as a fraction of the shorter side of a matrix, in (0, 1].
    precondition_every
        Updates between two steps of the eigenvectors of soap, at least 1.
    cautious_decay
        Whether to decay only the entries that the update shrinks too; not for adam.
    clip_norm
        Maximum global L2 norm of the gradient; larger ones are scaled to it; None: no clipping.
    clip_value
        Maximum absolute value of a gradient entry; None: no clipping.
    clip_adaptive
        Maximum gradient norm of a unit as a fraction of its weight norm (AGC); None: no clipping.
    decay_embeddings
        Whether weight decay applies to embedding tables too.
    moment_dtype
        Dtype in which moments are stored; they are always computed in float32.
    ema_decay
        Decay rate of the exponential moving average of the parameters for evaluation; None: none.
    groups
        "PATTERN: frozen" or "PATTERN: learning_rate_scale=0.1 weight_decay=0"; first match wins.

    Raises
    ------
    ConfigError
        If a value is out of range or the optimizer does not use it; lists all problems.
    """

    name: OptimizerName | str = "adamw"
    learning_rate: float = 6e-4
    weight_decay: float | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    polar_express: bool | None = None
    neuron_b2: float | None = None
    rank_fraction: float | None = None
    precondition_every: int | None = None
    cautious_decay: bool = False
    clip_norm: float | None = 1.0
    clip_value: float | None = None
    clip_adaptive: float | None = None
    decay_embeddings: bool = True
    moment_dtype: MomentDtype = "float32"
    ema_decay: float | None = None
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        defaults = optimizer_defaults()
        problems = []
        if self.name not in defaults:
            problems.append(
                unknown_name("name", self.name, defaults, register="tjx_optim.register_optimizer")
            )
        problems += _at_least_zero("learning_rate", self.learning_rate, "try 6e-4 for adamw")
        problems += _at_least_zero("weight_decay", self.weight_decay, "0 disables decay")
        for field in ("b1", "b2", "momentum", "neuron_b2", "ema_decay"):
            problems += _fraction(field, getattr(self, field))
        problems += _above_zero("eps", self.eps, "try 1e-8")
        if self.rank_fraction is not None and not 0 < self.rank_fraction <= 1:
            got = f"got {self.rank_fraction}; expected (0, 1]; try 0.25"
            problems.append(Problem("rank_fraction", got))
        if self.precondition_every is not None and self.precondition_every < 1:
            got = f"got {self.precondition_every}; expected at least 1; try 10"
            problems.append(Problem("precondition_every", got))
        problems += _above_zero("clip_norm", self.clip_norm, "None disables clipping")
        problems += _above_zero("clip_value", self.clip_value, "None disables clipping")
        problems += _above_zero("clip_adaptive", self.clip_adaptive, "try 0.01; None disables it")
        if self.moment_dtype not in get_args(MomentDtype):
            problems.append(unknown_name("moment_dtype", self.moment_dtype, get_args(MomentDtype)))
        problems += self._check_groups()
        if self.name in defaults:
            problems += [
                *self._unused_settings(),
                *self._check_settings(),
                *self._check_moment_dtype(),
            ]
        if problems:
            raise ConfigError(problems)

    @property
    def settings(self) -> dict[str, float | bool]:
        """The settings that the optimizer uses: the given values, or its defaults.

        Examples
        --------
        >>> OptimizerConfig(name="sgd", momentum=0.5).settings
        {'momentum': 0.5, 'nesterov': False, 'weight_decay': 0.0001}
        """
        defaults = optimizer_defaults()[self.name]
        given = {field: getattr(self, field) for field in defaults}
        return {f: defaults[f] if value is None else value for f, value in given.items()}

    @property
    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """The parsed groups, in order of precedence."""
        return tuple(parse_group(text) for text in self.groups)

    @property
    def averages(self) -> bool:
        """Whether the optimizer keeps an average of the parameters for evaluation."""
        return self.ema_decay is not None or self.name == "schedule_free_adamw"

    def _unused_settings(self) -> list[Problem]:
        """Report settings that the optimizer would ignore."""
        defaults = optimizer_defaults()
        return [
            Problem(
                field,
                f"got {getattr(self, field)}; expected none, since {self.name} does not use it "
                f"(only {', '.join(name for name in defaults if field in defaults[name])} do); "
                "leave it out",
                ("name",),
            )
            for field in SETTINGS
            if field not in defaults[self.name] and getattr(self, field) is not None
        ]

    def _check_settings(self) -> list[Problem]:
        """Check constraints of single optimizers."""
        problems = []
        settings = self.settings
        if self.name == "schedule_free_adamw":
            if settings["b1"] == 0:
                problems.append(
                    Problem(
                        "b1",
                        "got 0.0; expected (0, 1), since schedule_free_adamw divides by it; "
                        "try 0.9",
                        ("name",),
                    )
                )
            if self.ema_decay is not None:
                problems.append(
                    Problem(
                        "ema_decay",
                        f"got {self.ema_decay}; expected none, since schedule_free_adamw averages "
                        "the parameters itself; leave it out",
                        ("name",),
                    )
                )
        if self.name == "adafactor" and settings["b2"] == 0:
            problems.append(
                Problem(
                    "b2",
                    "got 0.0; expected (0, 1), since adafactor's decay rate 1 - t^-b2 would stay "
                    "0; try 0.8",
                    ("name",),
                )
            )
        if settings.get("nesterov") and settings["momentum"] == 0:
            problems.append(
                Problem(
                    "nesterov",
                    "got True; expected False without momentum; try momentum=0.9",
                    ("momentum",),
                )
            )
        if self.cautious_decay and self.name == "adam":
            problems.append(
                Problem(
                    "cautious_decay",
                    "got True; expected False, since adam's decay is part of the gradient; use "
                    "adamw, or leave it out",
                    ("name",),
                )
            )
        return problems

    def _check_moment_dtype(self) -> list[Problem]:
        """Report moments that bfloat16 would never update.

        A bfloat16 has 8 significant bits: a change below 2^-8 of the value can round to none.
        """
        if self.moment_dtype != "bfloat16":
            return []
        if self.name == "soap":
            return [
                Problem(
                    "moment_dtype",
                    "got 'bfloat16'; expected float32, since rounded eigenvectors are not "
                    "orthogonal; use float32, or muon, which has one moment only",
                    ("name",),
                )
            ]
        if self.name == "adafactor":
            return [
                Problem(
                    "moment_dtype",
                    "got 'bfloat16'; expected float32, since the decay rate of adafactor's second "
                    "moment tends to 1 and bfloat16 would round its updates to none; the factored "
                    "moment is small anyway",
                    ("name",),
                )
            ]
        fields = ("b1", "b2", "momentum", "neuron_b2")
        rates = {field: self.settings.get(field, 0.0) for field in fields}
        return [
            Problem(
                "moment_dtype",
                f"got 'bfloat16'; expected float32 with {field}={rate}: an update changes the "
                f"moment by less than 2^-8, which bfloat16 rounds to none; use float32 or {field} "
                "<= 0.996",
                (field,),
            )
            for field, rate in rates.items()
            if 1 - rate < 2**-8
        ]

    def _check_groups(self) -> list[Problem]:
        problems = []
        patterns = []
        for text in self.groups:
            try:
                patterns.append(parse_group(text).pattern)
            except ValueError as error:
                problems += [problem.within("groups") for problem in problems_of(error)]
        problems += [
            Problem("groups", f"got the pattern {pattern!r} twice; expected it once; keep one")
            for pattern in dict.fromkeys(patterns)
            if patterns.count(pattern) > 1
        ]
        return problems


def optimizer_defaults() -> dict[str, Mapping[str, float | bool]]:
    """Return the settings of every optimizer, built in and registered, with their defaults.

    Examples
    --------
    >>> optimizer_defaults()["lion"]
    {'b1': 0.9, 'b2': 0.99, 'weight_decay': 0.1}
    """
    registered = {name: entry.defaults for name, entry in registered_optimizers.items()}
    return {**DEFAULTS, **registered}


def _at_least_zero(field: str, given: float | None, hint: str) -> list[Problem]:
    if given is None or (math.isfinite(given) and given >= 0):
        return []
    return [Problem(field, f"got {given}; expected a finite number of at least 0; {hint}")]


def _above_zero(field: str, given: float | None, hint: str) -> list[Problem]:
    if given is None or (math.isfinite(given) and given > 0):
        return []
    return [Problem(field, f"got {given}; expected a finite number above 0; {hint}")]


def _fraction(field: str, given: float | None) -> list[Problem]:
    if given is None or 0 <= given < 1:
        return []
    return [Problem(field, f"got {given}; expected [0, 1); 0 disables it")]
