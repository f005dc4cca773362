"""Figures as SVG inside a page: in its colours, without addresses, with values to point at."""

import io
import json
import re
from html import escape
from itertools import count
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tjx_metrics.plotting.style import COLORS, GRID, INK

_MOST_POINTS = 600  # of a curve that is pointed at; a screen has no more columns
# What follows the scheme of the page, light or dark.
_THEME = {
    INK: "var(--ink)",
    GRID: "var(--grid)",
    COLORS[0]: "var(--line)",
    "#ffffff": "var(--card)",
    "#000000": "var(--ink)",
}
_numbers = count()


def inline_svg(figure: Figure, description: str) -> str:
    """Write a figure as an element of a page.

    Parameters
    ----------
    figure : Figure
        The figure.
    description : str
        What it shows, for those who do not see it.

    Returns
    -------
    str
        A ``div`` with the SVG, scaled to the width of the page; its ``data-hover`` holds the
        curves as JSON, for the page's script.
    """
    figure.patch.set_alpha(0)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None  # matplotlib writes one
    label = escape(description)
    head = f'<svg {box.group()} role="img" aria-label="{label}">'
    text = head + text[text.index(">") + 1 :].replace("xlink:href", "href").rstrip()
    text = _with_own_ids(text, f"chart{next(_numbers)}-")
    for color, variable in _THEME.items():
        text = re.sub(re.escape(color), variable, text, flags=re.IGNORECASE)
    hover = json.dumps([panel for axes in figure.axes if (panel := _panel(axes))])
    return f'<div class="chart" data-hover="{escape(hover)}">{text}</div>'


def _with_own_ids(svg: str, prefix: str) -> str:
    """Make the ids of a picture different from those of the others on the page."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}", svg)


def _panel(axes: Axes) -> dict[str, Any] | None:
    """Describe the named curves of axes; None where there are none."""
    series = [
        {
            "name": str(line.get_label()),
            "x": _rounded(line.get_xdata()),
            "y": _rounded(line.get_ydata()),
        }
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    ]
    if not series:
        return None
    place = axes.get_position()
    return {
        "box": [place.x0, 1 - place.y1, place.x1, 1 - place.y0],  # parts of the figure, y down
        "x": [*axes.get_xlim()],
        "log": axes.get_xscale() == "log",
        "series": series,
    }


def _rounded(values: Any) -> list[float | None]:
    """Return at most so many values as a screen shows, short; None where not finite."""
    array = np.asarray(values, np.float64)
    if array.size > _MOST_POINTS:
        array = array[np.unique(np.linspace(0, array.size - 1, _MOST_POINTS).astype(int))]
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in array]
