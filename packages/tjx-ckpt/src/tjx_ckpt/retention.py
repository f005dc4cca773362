"""Which checkpoints stay: the newest, every Kth, and the best."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay.

    Attributes
    ----------
    keep
        Number of the newest.
    every
        Steps that are multiples of this stay for good; None: no such.
    best
        Number of the best by ``metric``.
    metric, mode
        Name among the metrics of a save, and whether small ("min") or large ("max") is good.
        Checkpoints without it, or with NaN, are never among the best.

    Examples
    --------
    >>> losses = {10: {"loss": 3.0}, 20: {"loss": 2.0}, 30: {"loss": 2.5}, 40: {}, 50: {}}
    >>> Retention(keep=1, every=20, best=1, metric="loss").doomed(losses)
    [10, 30]
    """

    keep: int = 3
    every: int | None = None
    best: int = 0
    metric: str = "eval/loss"
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {value}: must be {least} or more; {advice}"
            for name, value, least, advice in (
                ("keep", self.keep, 1, "at least 1 checkpoint must stay"),
                ("keep_every", self.every, 1, "None keeps no such checkpoints"),
                ("keep_best", self.best, 0, "0 keeps none"),
            )
            if value is not None and value < least
        ]
        if self.mode not in ("min", "max"):
            problems.append(f"best_mode = {self.mode!r}: must be 'min' or 'max'")
        if problems:
            raise ValueError("\n".join(problems))

    def doomed(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Return the steps that may go, ascending.

        Parameters
        ----------
        metrics
            Step -> metrics of its save, for each checkpoint that is there.
        """
        steps = sorted(metrics)
        stays = set(steps[-self.keep :])
        if self.every is not None:
            stays.update(step for step in steps if step % self.every == 0)
        sign = -1 if self.mode == "max" else 1
        scores = {
            step: sign * value
            for step in steps
            if not math.isnan(value := metrics[step].get(self.metric, math.nan))
        }
        # Of equal ones the earlier: it needed fewer steps.
        stays.update(sorted(scores, key=lambda step: (scores[step], step))[: self.best])
        return [step for step in steps if step not in stays]
