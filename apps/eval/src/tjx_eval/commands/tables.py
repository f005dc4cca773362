"""Figures as tables on the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

Figure = float | int | str
_MOST_ROWS = 20
_LEAST_TEXT = 12  # characters that the longest column of text keeps on a narrow terminal


def print_figures(figures: Mapping[str, Figure]) -> None:
    """Print one figure a line."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), Text(shown(name, value)))
    Console().print(table)


def print_documents(rows: Sequence[Mapping[str, Figure]], *, title: str | None = None) -> None:
    """Print a document a line; of many the first, and how many more there are.

    The longest column of text is cut where the terminal is too narrow.
    """
    console = Console()
    cells = [{name: shown(name, value) for name, value in row.items()} for row in rows[:_MOST_ROWS]]
    names = list(dict.fromkeys(name for row in cells for name in row))
    widths = {n: max(len(n), *(len(row.get(n, "")) for row in cells)) for n in names}
    words = [n for n in names if any(isinstance(row.get(n), str) for row in rows)]
    if words:
        longest = max(words, key=lambda n: widths[n])
        wanting = sum(widths.values()) + 2 * len(names) - console.width
        widths[longest] = max(widths[longest] - max(wanting, 0), _LEAST_TEXT)
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(
            name.replace("_", " "), justify="left" if name in words else "right",
            no_wrap=True, overflow="ellipsis", width=widths[name],
        )  # fmt: skip
    for row in cells:
        table.add_row(*(Text(row.get(name, "")) for name in names))
    console.print()
    if title:
        console.print(Text(title))
    console.print(table)
    if len(rows) > _MOST_ROWS:
        more = len(rows) - _MOST_ROWS
        console.print(f"... and {more:,} more: --json FILE holds all")


def shown(name: str, value: Figure) -> str:
    """Write a figure as it is read: shares in percent, counts with commas."""
    if isinstance(value, float):
        if name.endswith("accuracy"):
            return f"{value:.2%}"
        return f"{value:,.0f}" if name == "tokens_per_sec" or value >= 1e5 else f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else value
