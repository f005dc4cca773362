"""Runs side by side: their figures, and what differs in their settings."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from tjx_metrics.plotting.run_data import RunData
from tjx_metrics.report.summary import Figures, config_of, summarize

# Where the run lies and what it is called differ always.
_NO_DIFFERENCE = ("run_dir", "name")


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


def short_count(value: float | int) -> str:
    """Write a count short.

    Examples
    --------
    >>> short_count(950), short_count(1_234_567), short_count(2.5e9)
    ('950', '1.23M', '2.50B')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2f}{letter}"
    return f"{value:.0f}"


# Column: the figure, and how it is written.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "steps": ("steps", _number(0)),
    "tokens": ("tokens", short_count),
    "hours": ("hours", _number(3)),
    "final eval": ("final_eval", _number(4)),
    "best eval": ("best_eval", _number(4)),
    "perplexity": ("perplexity", _number(2)),
    "bits/byte": ("bits_per_byte", _number(4)),
    "tokens/s": ("tokens_per_sec", _number(0)),
    "MFU": ("mfu", lambda value: f"{value:.1%}"),
    "params": ("parameters", short_count),
}


def comparison_table(runs: Sequence[RunData]) -> Table:
    """Return a table of the runs: a row each, the lowest evaluation loss first."""
    rows = sorted(
        ((run, summarize(run)) for run in runs),
        key=lambda row: math.inf if row[1].best_eval is None else row[1].best_eval,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    # A column in which no run has a figure says nothing.
    shown = [
        name
        for name, (field, _) in COLUMNS.items()
        if any(getattr(figures, field) is not None for _, figures in rows)
    ]
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for run, figures in rows:
        table.add_row(Text(run.name), *(cell(figures, name) for name in shown))
    return table


def cell(figures: Figures, column: str) -> str:
    """Write a figure as `comparison_table` shows it; a dash is not recorded."""
    field, write = COLUMNS[column]
    value = getattr(figures, field)
    return "-" if value is None else write(value)


def differences(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ: name, and the value of each run (None: unset)."""
    settings = [config_of(run) for run in runs]
    names = sorted(set().union(*settings) - set(_NO_DIFFERENCE))
    values = {name: [each.get(name) for each in settings] for name in names}
    return {name: each for name, each in values.items() if any(v != each[0] for v in each)}


def difference_table(runs: Sequence[RunData]) -> Table:
    """Return a table of what differs in the settings of those runs that recorded them."""
    runs = [run for run in runs if config_of(run)]
    table = Table(box=None, pad_edge=False)
    table.add_column("setting", overflow="fold")
    for run in runs:
        table.add_column(Text(run.name), overflow="fold")
    for name, values in differences(runs).items():
        table.add_row(Text(name), *(Text("-" if v is None else str(v)) for v in values))
    return table
