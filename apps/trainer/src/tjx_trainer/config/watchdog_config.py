"""Configuration of the watchdog: when a run counts as hung. Standard library and tjx_core only."""

import math
from dataclasses import dataclass

from tjx_core import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Hang detection and heartbeat.

    Attributes
    ----------
    enabled
        Whether a hung run is ended after writing its stacks; false for debugging.
    factor
        A step hangs if it takes this many times the median of the earlier steps.
    min_seconds
        Shorter phases never count as hung.
    heartbeat_seconds
        Seconds between two writes of heartbeat.json; without progress it is not written.
    """

    enabled: bool = True
    factor: float = 10.0
    min_seconds: float = 60.0
    heartbeat_seconds: float = 10.0

    def __post_init__(self) -> None:
        problems = [
            Problem(name, f"got {value}; expected a number above 0, such as {default:g}")
            for name, default in (("min_seconds", 60.0), ("heartbeat_seconds", 10.0))
            if not (math.isfinite(value := getattr(self, name)) and value > 0)
        ]
        if not (math.isfinite(self.factor) and self.factor > 1):
            problems.append(
                Problem(
                    "factor",
                    f"got {self.factor}; expected a number above 1, such as 10; to disable the "
                    "watchdog give --watchdog.enabled false",
                )
            )
        if problems:
            raise ConfigError(problems)
