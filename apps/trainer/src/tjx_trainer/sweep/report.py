"""Report of a sweep: a table, best first, and plots."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import tjx_metrics
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.sweep.manifest import read_manifest
from tjx_trainer.sweep.results import Result, read_results

CURVES, RESULT = "curves.png", "result.png"
MAX_CURVES = 7  # the number of colors
_NONE: Mapping[str, int] = {}


def report(folder: Path, *, metric: str, failed: Mapping[str, int] = _NONE) -> None:
    """Print the table of a sweep and write its plots.

    Parameters
    ----------
    folder : Path
        The folder of the sweep.
    metric : str
        The compared metric.
    failed : mapping of str to int
        Exit codes of runs that failed just now, by name.

    Raises
    ------
    ConfigError
        If the folder holds no sweep, or no run has the metric.
    """
    entry = read_manifest(folder)
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
    """Plot the results over the swept values and the loss curves; return the files."""
    from tjx_trainer.sweep.plots import draw_result

    measured = [result for result in results if math.isfinite(result.value)]
    if not measured:
        return []
    files = [folder / RESULT, folder / CURVES]
    draw_result(files[0], axes, measured, metric)
    shown = measured[:MAX_CURVES]
    tjx_metrics.plot_loss(
        [RunDirectory(folder / result.name).metrics for result in shown],
        files[1],
        labels=[result.name for result in shown],
        title=f"The best {len(shown)} runs" if len(shown) < len(measured) else "Loss",
    )
    return files
