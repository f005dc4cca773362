"""Progress and results of the runs of a sweep."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tjx_ckpt
import tjx_metrics
from tjx_core import ConfigError
from tjx_trainer.runtime.run_dir import RunDirectory


@dataclass(frozen=True)
class Result:
    """Progress and result of one run.

    Attributes
    ----------
    name : str
        Name of its folder.
    settings : mapping of str to str
        The swept values.
    step, max_steps : int
        Completed and total steps; 0 of 0 for a run that has not started.
    value : float
        The compared metric; NaN if unknown.
    """

    name: str
    settings: Mapping[str, str]
    step: int
    max_steps: int
    value: float

    @property
    def rank(self) -> float:
        """Sort key: the value, with unknown values last."""
        return self.value if math.isfinite(self.value) else math.inf

    @property
    def state(self) -> str:
        """Progress as text."""
        if not self.max_steps:
            return "not started"
        if self.step < self.max_steps:
            return f"{self.step:,} of {self.max_steps:,} steps"
        return "finished"


def is_finished(place: Path) -> bool:
    """Return whether a run has evaluated and saved its last step."""
    run = RunDirectory(place)
    if not run.config.exists() or not run.metrics.exists():
        return False
    config = run.read_config()
    last = config.train.max_steps
    # The evaluation is recorded before the checkpoint is saved.
    return last in tjx_ckpt.list_steps(run.checkpoint_location(config)) and any(
        record["step"] >= last and "eval/loss" in record
        for record in tjx_metrics.read_metrics(run.metrics)
    )


def read_results(folder: Path, runs: Sequence[Mapping[str, Any]], metric: str) -> list[Result]:
    """Read the results of the runs, best first.

    Raises
    ------
    ConfigError
        If there are metrics but none of this name.
    """
    results, names = [], set()
    for each in runs:
        run = RunDirectory(folder / each["name"])
        records: Sequence[Mapping[str, Any]] = []
        max_steps = 0
        if run.config.exists() and run.metrics.exists():
            records = tjx_metrics.read_metrics(run.metrics)
            max_steps = run.read_config().train.max_steps
        names |= {name for record in records for name in record}
        values = [record[metric] for record in records if metric in record]
        step = max((int(record["step"]) for record in records), default=0)
        value = float(values[-1]) if values else math.nan
        results.append(Result(each["name"], each["settings"], step, max_steps, value))
    if names and metric not in names:
        found = ", ".join(sorted(name for name in names if name.startswith("eval/")))
        raise ConfigError([f"--sweep.metric {metric}: no run has it; there are {found}"])
    return sorted(results, key=lambda result: result.rank)
