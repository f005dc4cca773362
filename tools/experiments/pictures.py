"""Plotting helpers shared by all experiments; they use no global state of matplotlib."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from tjx_metrics.plotting.style import COLORS

ARM_COLORS = (*COLORS, "#7F7F7F")
# Inches by number of panels; at 100 dots an inch about the width of a page on the screen.
WIDTHS = {1: 6.4, 2: 8.0, 3: 10.0}


def panels(count: int, *, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` axes side by side."""
    figure = Figure(figsize=(WIDTHS[count], height), layout="constrained")
    grid = figure.subplots(1, count, squeeze=False)
    return figure, list(grid[0])


def color(index: int) -> str:
    """Return the color of an arm, the same in all panels."""
    return ARM_COLORS[index % len(ARM_COLORS)]


def band(
    axes: Axes,
    x: ArrayLike,
    mean: ArrayLike,
    spread: ArrayLike,
    *,
    index: int,
    label: str,
    dashed: bool = False,
) -> None:
    """Draw a mean as a line with a band of one standard deviation on each side."""
    middle, width = np.asarray(mean), np.asarray(spread)
    style = "--" if dashed else "-"
    axes.plot(x, middle, color=color(index), linewidth=1.5, linestyle=style, label=label)
    axes.fill_between(x, middle - width, middle + width, color=color(index), alpha=0.2, linewidth=0)


def dress(axes: Axes, *, x: str, y: str, title: str) -> None:
    """Set labels, title and grid of the axes."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=11)
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, axes: Axes) -> None:
    """Add one legend for all panels below the axes."""
    handles, labels = axes.get_legend_handles_labels()
    lines = -(-len(labels) // 6)
    columns = -(-len(labels) // lines)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=9, edgecolor="none"
    )


def zoom(axes: Axes, values: Sequence[ArrayLike], *, share: float = 0.85) -> None:
    """Limit the y-axis to the lower part of falling curves, without the steep start.

    Parameters
    ----------
    axes : Axes
        Axes to zoom.
    values : sequence of arrays
        Curves; the lowest point of all sets the lower limit.
    share : float
        Fraction of all points that must be visible.
    """
    points = np.concatenate([np.ravel(np.asarray(curve, np.float64)) for curve in values])
    points = points[np.isfinite(points)]
    low, high = points.min(), np.quantile(points, share)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
