"""What configures an optimizer. Standard library only: it is read without JAX."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from tjx_optim.refusals import unknown_name

OptimizerName = Literal["adamw", "lion", "sgd"]


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
            problems.append(unknown_name("name", self.name, get_args(OptimizerName)))
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
