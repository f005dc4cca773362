"""Retention policy of checkpoints, and deletion of the others."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from tjx_ckpt.store.storage import Storage
from tjx_core import ConfigError, Problem, unknown_name


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Numbers of newest, periodic and best checkpoints to keep.

    Attributes
    ----------
    keep
        Number of newest checkpoints.
    every
        Steps that are multiples of this are kept permanently; None: no such.
    best
        Number of best checkpoints by ``metric``.
    metric, mode
        Name of a metric, and whether small ("min") or large ("max") values are better.
        Checkpoints without it, or with NaN, are never among the best.

    Raises
    ------
    ConfigError
        If a value is out of range; lists all problems.

    Examples
    --------
    >>> losses = {10: {"loss": 3.0}, 20: {"loss": 2.0}, 30: {"loss": 2.5}, 40: {}, 50: {}}
    >>> Retention(keep=1, every=20, best=1, metric="loss").prunable(losses)
    [10, 30]
    """

    keep: int = 3
    every: int | None = None
    best: int = 0
    metric: str = "eval/loss"
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        problems = [
            Problem(name, f"got {value}; expected at least {least}; {hint}")
            for name, value, least, hint in (
                ("keep", self.keep, 1, "one checkpoint must be kept"),
                ("keep_every", self.every, 1, "None disables it"),
                ("keep_best", self.best, 0, "0 disables it"),
            )
            if value is not None and value < least
        ]
        if self.mode not in ("min", "max"):
            problems.append(unknown_name("best_mode", self.mode, ("min", "max")))
        if problems:
            raise ConfigError(problems)

    def prunable(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Return the steps that are not kept, ascending.

        Parameters
        ----------
        metrics : mapping of int to mapping
            Metrics of each existing checkpoint, by step.
        """
        steps = sorted(metrics)
        kept = set(steps[-self.keep :])
        if self.every is not None:
            kept.update(step for step in steps if step % self.every == 0)
        sign = -1 if self.mode == "max" else 1
        scores = {
            step: sign * value
            for step in steps
            if not math.isnan(value := metrics[step].get(self.metric, math.nan))
        }
        # Of equal values the earlier step is better.
        kept.update(sorted(scores, key=lambda step: (scores[step], step))[: self.best])
        return [step for step in steps if step not in kept]


class Pruner:
    """Deletes checkpoints by a retention policy and caches the metrics of existing ones.

    Parameters
    ----------
    storage
        The checkpoints; locked while any is deleted.
    retention
        Which checkpoints to keep.
    read_metrics
        Returns the metrics of the checkpoint of a step.
    """

    def __init__(
        self,
        storage: Storage,
        retention: Retention,
        read_metrics: Callable[[int], Mapping[str, float]],
    ) -> None:
        self._storage, self._retention, self._read_metrics = storage, retention, read_metrics
        self._metrics: dict[int, Mapping[str, float]] = {}

    def remember(self, step: int, metrics: Mapping[str, float]) -> None:
        """Cache the metrics of a new checkpoint, so that its manifest is not read."""
        self._metrics[step] = metrics

    def prune(self) -> None:
        """Delete checkpoints that are not kept, and leftovers of failed deletions."""
        self._storage.remove_leftovers()
        metrics = {other: self._metrics_of(other) for other in self._storage.steps()}
        for other in self._retention.prunable(metrics):
            self.discard(other)

    def discard(self, step: int) -> None:
        """Delete a checkpoint and its cached metrics."""
        self._storage.discard(step)
        self._metrics.pop(step, None)

    def _metrics_of(self, step: int) -> Mapping[str, float]:
        if step not in self._metrics:
            self._metrics[step] = self._read_metrics(step)
        return self._metrics[step]
