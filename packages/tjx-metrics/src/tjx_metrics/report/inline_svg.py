"""Convert matplotlib figures to inline SVG with theme colors and hover data."""

import io
import json
import re
from html import escape
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tjx_metrics.plotting.style import COLORS, GRID, INK

_MOST_POINTS = 600  # per curve in the hover data; enough for the width of a plot
# Colors that follow the page's light or dark theme.
_THEME = {
    INK: "var(--ink)",
    GRID: "var(--grid)",
    COLORS[0]: "var(--line)",
    "#ffffff": "var(--card)",
    "#000000": "var(--ink)",
}


def inline_svg(figure: Figure, description: str, prefix: str) -> str:
    """Convert a figure to an HTML element.

    Parameters
    ----------
    figure : Figure
        The figure.
    description : str
        Accessible description (``aria-label``).
    prefix : str
        Prefix of all element ids, unique on the page.

    Returns
    -------
    str
        A ``div`` with the SVG, scaled to the page width; its attribute ``data-hover`` holds the
        curves as JSON for the page's script.
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
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}-", text)
    for color, variable in _THEME.items():
        text = re.sub(re.escape(color), variable, text, flags=re.IGNORECASE)
    hover = json.dumps([panel for axes in figure.axes if (panel := _panel(axes))])
    return f'<div class="chart" data-hover="{escape(hover)}">{text}</div>'


def _panel(axes: Axes) -> dict[str, Any] | None:
    """Return hover data of the labeled curves of axes; None if there are none."""
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
        "box": [place.x0, 1 - place.y1, place.x1, 1 - place.y0],  # figure fractions, y down
        "x": [*axes.get_xlim()],
        "log": axes.get_xscale() == "log",
        "series": series,
    }


def _rounded(values: Any) -> list[float | None]:
    """Return at most `_MOST_POINTS` values with six digits; None for non-finite values."""
    array = np.asarray(values, np.float64)
    if array.size > _MOST_POINTS:
        array = array[np.unique(np.linspace(0, array.size - 1, _MOST_POINTS).astype(int))]
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in array]
