"""Plots of a sweep: the compared metric over the swept values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tjx_metrics.plotting.style import (
    COLORS,
    LABEL,
    TICK,
    format_axes,
    legend,
    line_style,
    new_figure,
)
from tjx_trainer.sweep.grid import as_numbers
from tjx_trainer.sweep.results import Result


def draw_result(
    file: Path, axes: Mapping[str, Sequence[str]], results: Sequence[Result], metric: str
) -> None:
    """Plot one axis as a curve, two as a heat map, more as a bar per run.

    Parameters
    ----------
    file : Path
        Output file.
    axes : mapping of str to sequence of str
        The swept values by dotted name.
    results : sequence of Result
        Results with a value, best first.
    metric : str
        The compared metric.
    """
    if len(axes) == 1:
        figure = _curve(axes, results, metric)
    elif len(axes) == 2:
        figure = _map(axes, results, metric)
    else:
        figure = _bars(results, metric)
    figure.savefig(file, dpi=200)


def _curve(axes: Mapping[str, Sequence[str]], results: Sequence[Result], metric: str) -> Figure:
    figure = new_figure()
    plot = figure.add_subplot()
    (name,) = axes
    numbers = as_numbers(axes[name])
    places = dict(zip(axes[name], numbers or range(len(axes[name])), strict=True))
    points = sorted((places[result.settings[name]], result.value) for result in results)
    line = "-" if numbers else ""
    plot.plot(*zip(*points, strict=True), marker="o", linestyle=line, color=COLORS[0])
    best, written = results[0], results[0].settings[name]
    style: dict[str, Any] = {
        "marker": "o",
        "markersize": 11,
        "fillstyle": "none",
        "color": COLORS[1],
    }
    label = f"best: {written}, {best.value:.4f}"
    plot.plot(places[written], best.value, linestyle="", label=label, **style)
    format_axes(plot, title=f"{metric} at the end", x=name, y=metric)
    if numbers and is_geometric(numbers):
        plot.set_xscale("log")
    ticks = dict(zip(places.values(), axes[name], strict=True))
    plot.xaxis.set_major_locator(FixedLocator(list(ticks)))
    plot.xaxis.set_minor_locator(NullLocator())
    plot.xaxis.set_major_formatter(FuncFormatter(lambda at, _: ticks.get(at, "")))
    plot.margins(0.08)
    legend(plot)
    return figure


def is_geometric(numbers: Sequence[float]) -> bool:
    """Return whether numbers are spaced by factors rather than by differences.

    Examples
    --------
    >>> is_geometric([1e-4, 3e-4, 1e-3]), is_geometric([1.0, 2.0, 3.0]), is_geometric([0.0, 1.0])
    (True, False, False)
    """
    if len(numbers) < 2 or min(numbers) <= 0:
        return False
    values = np.sort(np.asarray(numbers, np.float64))
    if len(values) == 2:
        return bool(values[1] / values[0] >= 3)
    # Compare the relative spread of the steps on both scales.
    logs = np.log(values)
    return bool(np.ptp(np.diff(logs)) / np.ptp(logs) < np.ptp(np.diff(values)) / np.ptp(values))


def _map(axes: Mapping[str, Sequence[str]], results: Sequence[Result], metric: str) -> Figure:
    (down, downs), (across, acrosses) = axes.items()
    values = np.full((len(downs), len(acrosses)), np.nan)
    for result in results:
        at = downs.index(result.settings[down]), acrosses.index(result.settings[across])
        values[at] = result.value
    figure = new_figure(1.2 + 0.5 * len(downs))
    plot = figure.add_subplot()
    shade = np.ma.masked_invalid(values)
    image = plot.imshow(shade, cmap="viridis", aspect="auto")
    format_axes(plot, title=f"{metric} at the end (best framed)", x=across, y=down)
    plot.grid(visible=False)
    plot.set_xticks(range(len(acrosses)), acrosses)
    plot.set_yticks(range(len(downs)), downs)
    _write_values(plot, values)
    if np.isfinite(values).any():
        row, column = np.unravel_index(np.nanargmin(values), values.shape)
        plot.add_patch(_frame(int(row), int(column)))
    figure.colorbar(image).ax.tick_params(labelsize=TICK)
    return figure


def _write_values(plot: Axes, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    middle = (finite.min() + finite.max()) / 2 if finite.size else 0.0
    for (row, column), value in np.ndenumerate(values):
        text = f"{value:.3f}" if np.isfinite(value) else "-"
        color = "black" if not np.isfinite(value) or value > middle else "white"
        plot.text(column, row, text, ha="center", va="center", fontsize=TICK, color=color)


def _frame(row: int, column: int) -> Rectangle:
    return Rectangle(
        (column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=COLORS[1], linewidth=2.5, zorder=3
    )


def _bars(results: Sequence[Result], metric: str) -> Figure:
    figure = new_figure(0.8 + 0.25 * len(results))
    plot = figure.add_subplot()
    values = [result.value for result in results]
    plot.barh([result.name for result in results], values, color=line_style(0)["color"])
    for number, value in enumerate(values):
        plot.text(0, number, f" {value:.4f}", va="center", fontsize=TICK, color="white")
    format_axes(plot, title=f"{metric} at the end, best first", x=metric)
    plot.tick_params(axis="y", labelsize=LABEL - 2)
    plot.invert_yaxis()
    return figure
