"""What configures the guard of a training step. Standard library only: read without JAX."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens to steps that are not finite, and the loss scale of float16.

    Attributes
    ----------
    max_skipped
        Steps in a row without a finite gradient, each skipped, after which a run should end.
    initial_scale
        Factor of the loss at the first step, with float16 only; a power of two.
    growth_interval
        Finite steps in a row after which the loss scale is doubled.
    min_scale
        The loss scale is not halved below this, a power of two; only steps skipped at it count.

    Raises
    ------
    ValueError
        When a value is out of its range; all of them are named at once.
    """

    max_skipped: int = 10
    initial_scale: float = 65536.0
    growth_interval: int = 2000
    min_scale: float = 1.0

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value}: must be at least 1"
            for name in ("max_skipped", "growth_interval")
            if (value := getattr(self, name)) < 1
        ]
        scales = {"initial_scale": self.initial_scale, "min_scale": self.min_scale}
        wrong = [name for name, value in scales.items() if not _is_power_of_two(value)]
        problems += [
            f"{name}={scales[name]}: must be a power of two, so that it changes no bit of what is "
            "not too small or too large; try 65536"
            for name in wrong
        ]
        if not wrong and self.initial_scale < self.min_scale:
            problems.append(
                f"initial_scale={self.initial_scale}: must be at least min_scale={self.min_scale}"
            )
        if problems:
            raise ValueError("\n".join(problems))


def _is_power_of_two(value: float) -> bool:
    return math.isfinite(value) and value > 0 and math.frexp(value)[0] == 0.5
