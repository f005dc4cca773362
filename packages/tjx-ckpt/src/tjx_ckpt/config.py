"""How often a run is saved, where, and which saves are kept. Standard library only."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often a run is saved, where, and which saves are kept.

    Attributes
    ----------
    every
        Steps between two saves.
    keep
        Number of newest checkpoints that stay.
    keep_every
        Checkpoints of steps that are multiples of this stay for good; none: no such.
    keep_best
        Number of checkpoints that stay for being the best by best_metric.
    best_metric
        Metric of an evaluation at the step of the save, as in metrics.jsonl.
    best_mode
        Whether the best is the smallest (min) or the largest (max).
    on_error
        When a save fails (a full disk): stop the run, or continue and try again at the next save.
    directory
        Where checkpoints go, a folder or a URL such as s3://bucket/run; none: the run directory.
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
            f"{name} = {value}: must be 1 or more; {advice}"
            for name, value, advice in (
                ("every", self.every, "a larger number than max_steps saves only at the end"),
                ("keep", self.keep, "2 or more lets a run fall back when the newest is damaged"),
                ("keep_every", self.keep_every, "none keeps no such checkpoints"),
            )
            if value is not None and value < 1
        ]
        if self.keep_best < 0:
            problems.append(f"keep_best = {self.keep_best}: must be 0 or more; 0 keeps none")
        if not self.best_metric:
            problems.append("best_metric = '': must be a metric's name, such as eval/loss")
        problems += [
            f"{name} = {value!r}: must be one of {', '.join(allowed)}"
            for name, value, allowed in (
                ("best_mode", self.best_mode, ("min", "max")),
                ("on_error", self.on_error, ("stop", "continue")),
            )
            if value not in allowed
        ]
        spacing = self.keep_every
        if spacing is not None and min(spacing, self.every) >= 1 and spacing % self.every:
            problems.append(
                f"keep_every = {spacing}: must be a multiple of every = {self.every}, or nothing "
                "is saved at those steps"
            )
        if problems:
            raise ValueError("\n".join(problems))
