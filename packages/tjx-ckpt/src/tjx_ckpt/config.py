"""Configuration of checkpoints. Standard library only, so that it is read without JAX."""

from dataclasses import dataclass
from typing import Literal

from tjx_core import ConfigError, Problem, unknown_name


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Interval, directory and retention of checkpoints.

    Attributes
    ----------
    every
        Steps between two saves.
    keep
        Number of newest checkpoints to keep.
    keep_every
        Checkpoints of steps that are multiples of this are kept permanently; none: no such.
    keep_best
        Number of best checkpoints by best_metric to keep.
    best_metric
        Metric of an evaluation at the step of the save, as in metrics.jsonl.
    best_mode
        Whether the best value is the smallest (min) or the largest (max).
    on_error
        When a save fails (a full disk): stop the run, or continue and retry at the next save.
    directory
        Directory of the checkpoints, or a URL such as s3://bucket/run; none: the run directory.

    Raises
    ------
    ConfigError
        If a value is out of range or contradicts another; lists all problems.
    """

    every: int = 1000
    keep: int = 3
    keep_every: int | None = None
    keep_best: int = 0
    best_metric: str = "eval/loss"
    best_mode: Literal["min", "max"] = "min"
    on_error: Literal["stop", "continue"] = "stop"
    directory: str | None = None

    def __post_init__(self) -> None:
        problems = [
            Problem(name, f"got {value}; expected at least {least}; {hint}")
            for name, value, least, hint in (
                ("every", self.every, 1, "a number above max_steps saves only at the end"),
                ("keep", self.keep, 1, "2 or more allow a fallback if the newest is damaged"),
                ("keep_every", self.keep_every, 1, "none disables it"),
                ("keep_best", self.keep_best, 0, "0 disables it"),
            )
            if value is not None and value < least
        ]
        if not self.best_metric:
            problems.append(
                Problem("best_metric", "got ''; expected the name of a metric; try eval/loss")
            )
        problems += [
            unknown_name(name, value, allowed)
            for name, value, allowed in (
                ("best_mode", self.best_mode, ("min", "max")),
                ("on_error", self.on_error, ("stop", "continue")),
            )
            if value not in allowed
        ]
        spacing = self.keep_every
        if spacing is not None and min(spacing, self.every) >= 1 and spacing % self.every:
            problems.append(
                Problem(
                    "keep_every",
                    f"got {spacing}; expected a multiple of every={self.every}, since only those "
                    "steps are saved",
                    ("every",),
                )
            )
        if problems:
            raise ConfigError(problems)
