"""Configuration of the dial, one number that sets a run. Standard library and tjx_core only."""

import math
from dataclasses import dataclass

from tjx_core import ConfigError, Problem

MAX_DEPTH = 1000


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """The dial: one number that sets the size, length and optimizer of a run of a GPT by rules.

    `tjx_trainer.scaling.dial` has the rules and their sources. A value that is set by its own flag
    keeps it, and the rules of the other values use it.

    Attributes
    ----------
    depth
        Blocks, from which the other values follow; none: no dial, or that of flops.
    flops
        Training FLOPs, 6 x parameters x tokens; depth and width are the nearest with
        tokens_per_parameter, and the tokens spend the FLOPs; none: no dial, or that of depth.
    tokens_per_parameter
        Training tokens per parameter of the blocks.
    width_per_layer
        Features of the residual stream per block.
    head_size
        Features of an attention head.

    Raises
    ------
    ConfigError
        With every invalid value.
    """

    depth: int | None = None
    flops: float | None = None
    tokens_per_parameter: float = 20.0
    width_per_layer: int = 64
    head_size: int = 64

    def __post_init__(self) -> None:
        problems = []
        if self.depth is not None and not 1 <= self.depth <= MAX_DEPTH:
            problems.append(Problem("depth", f"got {self.depth}; expected 1 to {MAX_DEPTH}; try 4"))
        for name, example in (("flops", 1e15), ("tokens_per_parameter", 20)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                message = f"got {value}; expected a number above 0, such as {example:g}"
                problems.append(Problem(name, message))
        for name in ("width_per_layer", "head_size"):
            value = getattr(self, name)
            if value < 2 or value % 2:
                message = f"got {value}; expected an even number of at least 2, such as 64"
                problems.append(Problem(name, message))
        if self.depth is not None and self.flops is not None:
            message = f"got {self.flops:g} with depth {self.depth}; expected one of them; omit one"
            problems.append(Problem("flops", message, ("depth",)))
        if problems:
            raise ConfigError(problems)

    @property
    def is_set(self) -> bool:
        """Whether the dial is in use."""
        return self.depth is not None or self.flops is not None
