"""When a run counts as hanging, and how often it says that it lives. Standard library only."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a run counts as hanging, and how often it says that it lives.

    Attributes
    ----------
    enabled
        Whether a run that hangs is ended, its stacks being written; false to debug it in peace.
    factor
        A step hangs when it takes this many times the median of those before it.
    min_seconds
        Nothing that takes less counts as hanging.
    heartbeat_seconds
        Seconds between two writes of heartbeat.json; without progress it is not written.
    """

    enabled: bool = True
    factor: float = 10.0
    min_seconds: float = 60.0
    heartbeat_seconds: float = 10.0

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value}: must be a number above 0, such as {default:g}"
            for name, default in (("min_seconds", 60.0), ("heartbeat_seconds", 10.0))
            if not (math.isfinite(value := getattr(self, name)) and value > 0)
        ]
        if not (math.isfinite(self.factor) and self.factor > 1):
            problems.append(
                f"factor={self.factor}: must be above 1, such as 10; to switch it off give "
                "--watchdog.enabled false"
            )
        if problems:
            raise ValueError("\n".join(problems))
