"""Compare runs: a table of their summaries, and the config values that differ."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from tjx_core import printable
from tjx_metrics.plotting.run_data import RunData
from tjx_metrics.report.summary import RunSummary, config_of, summarize

# These always differ.
_IGNORED = ("run_dir", "name")


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


def short_count(value: float | int) -> str:
    """Format a count with a suffix for thousands, millions, billions or trillions.

    Examples
    --------
    >>> short_count(950), short_count(1_234_567), short_count(2.5e9)
    ('950', '1.23M', '2.50B')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2f}{letter}"
    return f"{value:.0f}"


# Column -> field of `RunSummary`, and its format.
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
    """Return a table with one row per run, sorted by the best evaluation loss."""
    rows = sorted(
        ((run, summarize(run)) for run in runs),
        key=lambda row: math.inf if row[1].best_eval is None else row[1].best_eval,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    columns = [
        name
        for name, (field, _) in COLUMNS.items()
        if any(getattr(summary, field) is not None for _, summary in rows)
    ]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for run, summary in rows:
        table.add_row(Text(run.name), *(cell(summary, name) for name in columns))
    return table


def cell(summary: RunSummary, column: str) -> str:
    """Format one cell of `comparison_table`; "-" if the value is not recorded."""
    field, write = COLUMNS[column]
    value = getattr(summary, field)
    return "-" if value is None else write(value)


def differences(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """Return the config values that differ: dotted name -> value of each run (None: unset)."""
    configs = [config_of(run) for run in runs]
    names = sorted(set().union(*configs) - set(_IGNORED))
    values = {name: [each.get(name) for each in configs] for name in names}
    return {name: each for name, each in values.items() if any(v != each[0] for v in each)}


def difference_table(runs: Sequence[RunData]) -> Table:
    """Return a table of the config values that differ between runs with a recorded config."""
    runs = [run for run in runs if config_of(run)]
    table = Table(box=None, pad_edge=False)
    table.add_column("setting", overflow="fold")
    for run in runs:
        table.add_column(Text(run.name), overflow="fold")
    for name, values in differences(runs).items():
        table.add_row(Text(name), *(Text("-" if v is None else printable(str(v))) for v in values))
    return table
