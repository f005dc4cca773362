"""Configuration of the non-finite guard. Standard library only, so that it is read without JAX."""

import math
from dataclasses import dataclass

from tjx_core import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Limit of skipped non-finite steps, and the dynamic loss scale of float16.

    Attributes
    ----------
    max_skipped
        Consecutive skipped (non-finite) steps after which a run should stop.
    initial_scale
        Loss scale of the first step, for float16 only; a power of two.
    growth_interval
        Consecutive finite steps after which the loss scale is doubled.
    min_scale
        Lower bound of the loss scale, a power of two; skipped steps count only at this bound.

    Raises
    ------
    ConfigError
        If a value is out of range; lists all problems.
    """

    max_skipped: int = 10
    initial_scale: float = 65536.0
    growth_interval: int = 2000
    min_scale: float = 1.0

    def __post_init__(self) -> None:
        problems = [
            Problem(name, f"got {value}; expected at least 1")
            for name in ("max_skipped", "growth_interval")
            if (value := getattr(self, name)) < 1
        ]
        scales = {"initial_scale": self.initial_scale, "min_scale": self.min_scale}
        invalid = [name for name, value in scales.items() if not _is_power_of_two(value)]
        problems += [
            Problem(
                name,
                f"got {scales[name]}; expected a power of two, which scales without rounding; "
                "try 65536",
            )
            for name in invalid
        ]
        if not invalid and self.initial_scale < self.min_scale:
            problems.append(
                Problem(
                    "initial_scale",
                    f"got {self.initial_scale}; expected at least min_scale={self.min_scale}",
                    ("min_scale",),
                )
            )
        if problems:
            raise ConfigError(problems)


def _is_power_of_two(value: float) -> bool:
    return math.isfinite(value) and value > 0 and math.frexp(value)[0] == 0.5
