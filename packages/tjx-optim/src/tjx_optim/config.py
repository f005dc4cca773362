"""What configures an optimizer and its schedule. Standard library only: it is read without JAX."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

OptimizerName = Literal["adamw", "lion", "sgd"]
ScheduleName = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer: which one, how large its steps are, and what keeps them in bounds.

    Attributes
    ----------
    name
        Optimizer: adamw (Adam when weight_decay is 0), lion, or sgd (with momentum b1).
    learning_rate
        Peak learning rate, a step; the schedule scales it.
    weight_decay
        Decoupled decay, a step and unit of learning rate; biases and norm scales never decay.
    b1
        Decay rate of the first moment (adamw, lion) or the momentum (sgd), in [0, 1).
    b2
        Decay rate of the second moment (adamw) or of the momentum (lion), in [0, 1); sgd has none.
    eps
        Added to the root of the second moment (adamw only).
    clip_norm
        Largest global L2 norm of the gradient; larger ones are scaled to it; None clips nothing.
    decay_embeddings
        Whether weight decay applies to embedding tables too.

    Raises
    ------
    ValueError
        When a value is out of its range; all of them are named at once.
    """

    name: OptimizerName = "adamw"
    learning_rate: float = 6e-4
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    decay_embeddings: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.name not in get_args(OptimizerName):
            problems.append(_unknown("name", self.name, get_args(OptimizerName)))
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            problems.append(
                f"learning_rate={self.learning_rate}: must be a finite number of at least 0; "
                "try 6e-4 for adamw"
            )
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            problems.append(
                f"weight_decay={self.weight_decay}: must be a finite number of at least 0; "
                "0 turns decay off"
            )
        problems += [
            f"{field}={value}: must lie in [0, 1); use 0 for none"
            for field, value in (("b1", self.b1), ("b2", self.b2))
            if not 0 <= value < 1
        ]
        if not (math.isfinite(self.eps) and self.eps > 0):
            problems.append(f"eps={self.eps}: must be finite and above 0; try 1e-8")
        if self.clip_norm is not None and not (
            math.isfinite(self.clip_norm) and self.clip_norm > 0
        ):
            problems.append(
                f"clip_norm={self.clip_norm}: must be finite and above 0; None turns clipping off"
            )
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps: a linear warm-up, then a decay by name.

    Attributes
    ----------
    name
        Shape after the warm-up: cosine or linear (down to the final fraction), or constant.
    warmup_steps
        Steps of linear warm-up; step s < warmup_steps has peak * (s + 1) / (warmup_steps + 1).
    decay_steps
        Step at which the decay is done, warm-up included; None means the last step of the run.
    final_fraction
        Learning rate at and after decay_steps, as a fraction of the peak; unused by constant.

    Raises
    ------
    ValueError
        When a value is out of its range; all of them are named at once.
    """

    name: ScheduleName = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        problems = []
        if self.name not in get_args(ScheduleName):
            problems.append(_unknown("name", self.name, get_args(ScheduleName)))
        if self.warmup_steps < 0:
            problems.append(
                f"warmup_steps={self.warmup_steps}: must be at least 0; 0 is no warm-up"
            )
        if self.decay_steps is not None and self.decay_steps <= max(self.warmup_steps, 0):
            problems.append(
                f"decay_steps={self.decay_steps}: includes the warm-up, so it must be above "
                f"warmup_steps={self.warmup_steps}; raise it, or leave it out to decay to the end"
            )
        if not 0 <= self.final_fraction <= 1:
            problems.append(
                f"final_fraction={self.final_fraction}: must lie in [0, 1]; 0.1 ends at a tenth"
            )
        if problems:
            raise ValueError("\n".join(problems))


def _unknown(field: str, given: str, allowed: tuple[str, ...]) -> str:
    return f"{field}={given!r}: must be one of {', '.join(allowed)}"
