"""Configuration of logging and profiling. Imports neither JAX nor matplotlib."""

import re
from dataclasses import dataclass

from tjx_core import ConfigError, Problem, unknown_name
from tjx_metrics.metrics.registration import registered_metrics
from tjx_metrics.trackers.registration import tracker_names


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics that a run logs, their intervals and trackers.

    Attributes
    ----------
    every
        Steps between two records of training metrics.
    trackers
        Trackers besides metrics.jsonl and the console: tensorboard, wandb, trackio, or registered.
    project
        Project name in wandb and trackio.
    layer_norms_every
        Steps between two records of per-layer gradient, parameter and update norms.
    histograms_every
        Steps between two records of per-layer parameter histograms.
    samples_every
        Steps between two generated text samples; none: only at the end of training.
    accuracies
        Whether text evaluations compute top-1, 5 and 10 accuracy, which needs all logits.
    metrics
        Registered metrics that evaluations compute, which needs all logits.

    Raises
    ------
    ConfigError
        If values are out of range, with all problems.
    """

    every: int = 10
    trackers: tuple[str, ...] = ()
    project: str = "tjx"
    layer_norms_every: int | None = None
    histograms_every: int | None = None
    samples_every: int | None = None
    accuracies: bool = False
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.every < 1:
            message = f"got {self.every}; expected at least 1; 1 records each step"
            problems.append(Problem("every", message))
        problems += [
            Problem(name, f"got {value}; expected at least 1, or none for never")
            for name in ("layer_norms_every", "histograms_every", "samples_every")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        problems += [
            unknown_name("trackers", name, tracker_names(), register="tjx_metrics.register_tracker")
            for name in self.trackers
            if name not in tracker_names()
        ]
        problems += [
            unknown_name(
                "metrics", name, registered_metrics, register="tjx_metrics.register_metric"
            )
            for name in self.metrics
            if name not in registered_metrics
        ]
        problems += [
            Problem(field, f"got {','.join(names)}; expected each name once")
            for field, names in (("trackers", self.trackers), ("metrics", self.metrics))
            if len(set(names)) < len(names)
        ]
        if not self.project:
            problems.append(Problem("project", "got ''; expected a name, such as tjx"))
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Select the steps that are profiled.

    Attributes
    ----------
    steps
        Steps to trace, as 10-15 or 10; choose steps after the first ones, which compile.

    Raises
    ------
    ConfigError
        If `steps` cannot be parsed.
    """

    steps: str | None = None

    def __post_init__(self) -> None:
        if self.steps is None:
            return
        match = re.fullmatch(r"([0-9]{1,15})(?:-([0-9]{1,15}))?", self.steps)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ConfigError([
                Problem("steps", f"got {self.steps!r}; expected a step or a range, such as 10-15")
            ])  # fmt: skip

    @property
    def range(self) -> tuple[int, int] | None:
        """First and last profiled step, both inclusive; None if profiling is off."""
        if self.steps is None:
            return None
        first, _, last = self.steps.partition("-")
        return int(first), int(last or first)
