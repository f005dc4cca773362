"""What came out of a sweep: a table, best first, and pictures."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tjx_metrics
from tjx_trainer.config import ConfigError
from tjx_trainer.run_dir import RunDirectory

CURVES, RESULT = "curves.png", "result.png"
MOST_CURVES = 7  # as many as there are colours
_NONE: Mapping[str, int] = {}


@dataclass(frozen=True)
class Result:
    """How far a run of a sweep came.

    Attributes
    ----------
    name : str
        Its folder's name.
    settings : mapping of str to str
        The values that are swept.
    step, max_steps : int
        Steps made, and of how many; 0 of 0 for a run that was not begun.
    value : float
        What is compared; NaN before it was measured.
    """

    name: str
    settings: Mapping[str, str]
    step: int
    max_steps: int
    value: float

    @property
    def rank(self) -> float:
        """What runs are sorted by: the best first, those without a number last."""
        return self.value if math.isfinite(self.value) else math.inf

    @property
    def state(self) -> str:
        """How far it is, in words."""
        if not self.max_steps:
            return "not begun"
        if self.step < self.max_steps:
            return f"{self.step:,} of {self.max_steps:,} steps"
        return "finished"


def is_finished(place: Path) -> bool:
    """Tell whether a run has made its last step and evaluated it."""
    run = RunDirectory(place)
    if not run.config.exists() or not run.metrics.exists():
        return False
    last = run.read_config().train.max_steps
    return any(
        record["step"] >= last and "eval/loss" in record
        for record in tjx_metrics.read_metrics(run.metrics)
    )


def read_results(folder: Path, runs: Sequence[Mapping[str, Any]], metric: str) -> list[Result]:
    """Read the results of a sweep's runs, best first.

    Raises
    ------
    ConfigError
        If no run has the metric though there are records.
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


def report(folder: Path, *, metric: str, failed: Mapping[str, int] = _NONE) -> None:
    """Print the table of a sweep, and draw its pictures.

    Parameters
    ----------
    folder : Path
        The sweep's.
    metric : str
        What is compared.
    failed : mapping of str to int
        Exit codes of runs that have just failed, by name.

    Raises
    ------
    ConfigError
        If the folder holds no sweep, or its runs have no such metric.
    """
    from tjx_trainer.sweep import read_sweep

    entry = read_sweep(folder)
    results = read_results(folder, entry["runs"], metric)
    Console(file=sys.stdout).print(_table(results, [*entry["axes"]], metric, failed))
    for file in draw(folder, entry["axes"], results, metric):
        sys.stdout.write(f"{file}\n")


def _table(
    results: Sequence[Result], axes: Sequence[str], metric: str, failed: Mapping[str, int]
) -> Table:
    table = Table()
    table.add_column("", justify="right")
    for axis in axes:
        table.add_column(axis, justify="right", overflow="fold")
    table.add_column(metric, justify="right")
    table.add_column("run")
    for number, result in enumerate(results, 1):
        value = "-" if math.isnan(result.value) else f"{result.value:.4f}"
        code = failed.get(result.name)
        state = result.state if code is None else f"failed ({code}), {result.state}"
        table.add_row(str(number), *(result.settings[axis] for axis in axes), value, state)
    return table


def draw(
    folder: Path, axes: Mapping[str, Sequence[str]], results: Sequence[Result], metric: str
) -> list[Path]:
    """Draw the result over what was swept, and the runs' curves; return the files."""
    from tjx_trainer.sweep_picture import draw_result

    measured = [result for result in results if math.isfinite(result.value)]
    if not measured:
        return []
    files = [folder / RESULT, folder / CURVES]
    draw_result(files[0], axes, measured, metric)
    shown = measured[:MOST_CURVES]
    tjx_metrics.plot_loss(
        [RunDirectory(folder / result.name).metrics for result in shown],
        files[1],
        labels=[result.name for result in shown],
        title=f"The best {len(shown)} runs" if len(shown) < len(measured) else "Loss",
    )
    return files
