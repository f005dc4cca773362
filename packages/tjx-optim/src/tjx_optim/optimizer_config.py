"""What configures an optimizer. Standard library only: it is read without JAX."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from tjx_optim.param_groups import ParameterGroup, parse_group
from tjx_optim.refusals import above_zero, at_least_zero, fraction, unknown_name

OptimizerName = Literal[
    "sgd", "adam", "adamw", "lamb", "lion", "adafactor", "muon", "schedule_free_adamw"
]
MomentDtype = Literal["float32", "bfloat16"]

DEFAULTS: Mapping[str, Mapping[str, float | bool]] = {
    # He et al. 2016, section 3.4; with momentum, decoupled and coupled decay nearly agree.
    "sgd": {"momentum": 0.9, "nesterov": False, "weight_decay": 1e-4},
    # Kingma and Ba 2015, algorithm 1.
    "adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
    # Loshchilov and Hutter 2019; the numbers of GPT-3 (Brown et al. 2020) and nanoGPT.
    "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
    # You et al. 2020, section 4.
    "lamb": {"b1": 0.9, "b2": 0.999, "eps": 1e-6, "weight_decay": 0.01},
    # Chen et al. 2023, algorithm 2.
    "lion": {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1},
    # Shazeer and Stern 2018, algorithm 4: b2 is the exponent of the decay rate 1 - t^-b2.
    "adafactor": {"b1": 0.0, "b2": 0.8, "eps": 1e-30, "weight_decay": 0.0},
    # Liu et al. 2025, section 2; b1, b2 and eps are those of the AdamW beside it.
    "muon": {
        "momentum": 0.95,
        "nesterov": True,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
    },
    # Defazio et al. 2024, algorithm 1; b1 says how far the gradients' point is averaged.
    "schedule_free_adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
}
"""What each optimizer heeds, and the number that it takes where none is given."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer: which one, how large its steps are, and what keeps them in bounds.

    Attributes
    ----------
    name
        Optimizer; what is left out below takes its own default.
    learning_rate
        Peak learning rate, a step; the schedule scales it.
    weight_decay
        Decay, a step and unit of learning rate (adam: L2); never of biases and norm scales.
    b1
        Decay rate of the first moment (lion: mixing rate), in [0, 1); schedule-free: in (0, 1).
    b2
        Decay rate of the second moment (lion: momentum), in [0, 1); adafactor: exponent, (0, 1).
    eps
        Added to the root of the second moment (adafactor: to the squared gradient).
    momentum
        Momentum of sgd and of muon's matrices, in [0, 1).
    nesterov
        Whether that momentum looks ahead.
    clip_norm
        Largest global L2 norm of the gradient; larger ones are scaled to it; None clips nothing.
    clip_value
        Largest size of one entry of the gradient; None clips nothing.
    clip_adaptive
        Largest norm of a unit's gradient as a fraction of its weights' (AGC); None clips nothing.
    decay_embeddings
        Whether weight decay applies to embedding tables too.
    moment_dtype
        What moments are stored in; they are always computed in float32.
    ema_decay
        Decay rate of the parameters' running mean that evaluation uses; None keeps no mean.
    groups
        "PATTERN: frozen" or "PATTERN: learning_rate_scale=0.1 weight_decay=0"; the first decides.

    Raises
    ------
    ValueError
        When a value is out of its range or the optimizer does not heed it; all are named at once.
    """

    name: OptimizerName = "adamw"
    learning_rate: float = 6e-4
    weight_decay: float | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    clip_norm: float | None = 1.0
    clip_value: float | None = None
    clip_adaptive: float | None = None
    decay_embeddings: bool = True
    moment_dtype: MomentDtype = "float32"
    ema_decay: float | None = None
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = self.name in DEFAULTS
        problems = [] if known else [unknown_name("name", self.name, get_args(OptimizerName))]
        problems += at_least_zero("learning_rate", self.learning_rate, "try 6e-4 for adamw")
        problems += at_least_zero("weight_decay", self.weight_decay, "0 turns decay off")
        for field in ("b1", "b2", "momentum", "ema_decay"):
            problems += fraction(field, getattr(self, field))
        problems += above_zero("eps", self.eps, "try 1e-8")
        problems += above_zero("clip_norm", self.clip_norm, "None turns clipping off")
        problems += above_zero("clip_value", self.clip_value, "None turns clipping off")
        problems += above_zero("clip_adaptive", self.clip_adaptive, "try 0.01; None turns it off")
        if self.moment_dtype not in get_args(MomentDtype):
            problems.append(unknown_name("moment_dtype", self.moment_dtype, get_args(MomentDtype)))
        problems += self._bad_groups()
        if known:
            problems += [*self._unheeded(), *self._impossible(), *self._bad_moment_dtype()]
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def settings(self) -> dict[str, float | bool]:
        """The numbers that the optimizer heeds: those given, and its defaults for the others.

        Examples
        --------
        >>> OptimizerConfig(name="sgd", momentum=0.5).settings
        {'momentum': 0.5, 'nesterov': False, 'weight_decay': 0.0001}
        """
        defaults = DEFAULTS[self.name]
        given = {field: getattr(self, field) for field in defaults}
        return {f: defaults[f] if value is None else value for f, value in given.items()}

    @property
    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """The groups, read from their texts, in the order in which they are asked."""
        return tuple(parse_group(text) for text in self.groups)

    @property
    def averages(self) -> bool:
        """Whether the optimizer keeps a mean of the parameters, for evaluation."""
        return self.ema_decay is not None or self.name == "schedule_free_adamw"

    def _unheeded(self) -> list[str]:
        """Refuse what the optimizer would ignore."""
        return [
            f"{field}={getattr(self, field)}: {self.name} has none, only "
            f"{', '.join(name for name in DEFAULTS if field in DEFAULTS[name])}; leave it out"
            for field in ("b1", "b2", "eps", "momentum", "nesterov")
            if field not in DEFAULTS[self.name] and getattr(self, field) is not None
        ]

    def _impossible(self) -> list[str]:
        """Refuse values that are in range, but not for this optimizer."""
        problems = []
        settings = self.settings
        if self.name == "schedule_free_adamw":
            if settings["b1"] == 0:
                problems.append("b1=0.0: schedule_free_adamw divides by it; give one in (0, 1)")
            if self.ema_decay is not None:
                problems.append(
                    f"ema_decay={self.ema_decay}: schedule_free_adamw has a running mean of its "
                    "own; leave ema_decay out"
                )
        if self.name == "adafactor" and settings["b2"] == 0:
            problems.append("b2=0.0: adafactor's decay rate 1 - t^-b2 would stay 0; try 0.8")
        if settings.get("nesterov") and settings["momentum"] == 0:
            problems.append("nesterov=True: needs a momentum above 0; try momentum=0.9")
        return problems

    def _bad_moment_dtype(self) -> list[str]:
        """Refuse moments that would stand still.

        A bfloat16 has 8 significant bits: what changes by less than 2^-8 of itself a step may not
        change at all.
        """
        if self.moment_dtype != "bfloat16":
            return []
        if self.name == "adafactor":
            return [
                "moment_dtype='bfloat16': the decay rate of adafactor's second moment tends to 1, "
                "so that it would stand still; use float32, which is small as it is factored"
            ]
        rates = {field: self.settings.get(field, 0.0) for field in ("b1", "b2", "momentum")}
        return [
            f"moment_dtype='bfloat16': with {field}={rate} a moment changes by less than 2^-8 of "
            f"itself a step and would stand still in bfloat16; use float32 or {field} <= 0.996"
            for field, rate in rates.items()
            if 1 - rate < 2**-8
        ]

    def _bad_groups(self) -> list[str]:
        problems = []
        patterns = []
        for text in self.groups:
            try:
                patterns.append(parse_group(text).pattern)
            except ValueError as error:
                problems += [f"groups: {line}" for line in str(error).splitlines()]
        problems += [
            f"groups: the pattern {pattern!r} is given twice: keep one"
            for pattern in dict.fromkeys(patterns)
            if patterns.count(pattern) > 1
        ]
        return problems
