"""Print metrics as tables on the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tjx_eval.scoring.score import Metric

_MAX_ROWS = 20
_MIN_TEXT_WIDTH = 12  # of the longest text column on a narrow terminal


def print_metrics(metrics: Mapping[str, Metric]) -> None:
    """Print one metric per line."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), Text(format_metric(name, value)))
    Console().print(table)


def print_rows(
    rows: Sequence[Mapping[str, Metric]], *, title: str | None = None, max_rows: int = _MAX_ROWS
) -> None:
    """Print one row per line, at most `max_rows`, and the number of omitted rows.

    The longest text column is truncated to the width of the terminal. In a file or pipe, numbers
    are never truncated.
    """
    console = Console()
    cells = [
        {name: format_metric(name, value) for name, value in row.items()} for row in rows[:max_rows]
    ]
    names = list(dict.fromkeys(name for row in cells for name in row))
    widths = {n: max(len(n), *(len(row.get(n, "")) for row in cells)) for n in names}
    text_columns = [n for n in names if any(isinstance(row.get(n), str) for row in rows)]
    if text_columns:
        longest = max(text_columns, key=lambda n: widths[n])
        excess = sum(widths.values()) + 2 * len(names) - console.width
        widths[longest] = max(widths[longest] - max(excess, 0), _MIN_TEXT_WIDTH)
    if not console.is_terminal:
        console.width = max(console.width, sum(widths.values()) + 2 * len(names))
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(
            name.replace("_", " "), justify="left" if name in text_columns else "right",
            no_wrap=True, overflow="ellipsis", width=widths[name],
        )  # fmt: skip
    for row in cells:
        table.add_row(*(Text(row.get(name, "")) for name in names))
    console.print()
    if title:
        console.print(Text(title))
    console.print(table)
    if len(rows) > max_rows:
        console.print(f"... and {len(rows) - max_rows:,} more: --json FILE holds all")


def format_metric(name: str, value: Metric) -> str:
    """Format a metric: accuracies in percent, large numbers with thousands separators."""
    if isinstance(value, float):
        if name.endswith("accuracy"):
            return f"{value:.2%}"
        return f"{value:,.0f}" if name == "tokens_per_sec" or value >= 1e5 else f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else value
