"""Figures as tables on the terminal."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

Figure = float | int | str


def print_figures(figures: Mapping[str, Figure]) -> None:
    """Print one figure a line."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), shown(name, value))
    Console().print(table)


def shown(name: str, value: Figure) -> str:
    """Write a figure as it is read: shares in percent, counts with commas."""
    if isinstance(value, float):
        if name.endswith("accuracy"):
            return f"{value:.2%}"
        return f"{value:,.0f}" if name == "tokens_per_sec" else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else value
