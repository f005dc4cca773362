"""Shared style of all plots: sizes, colors, axes, limits, legends and file output."""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from tjx_core import write_atomically

# Okabe and Ito's colorblind-safe palette; plots of a single run use the first two.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Line styles distinguish runs in grayscale.
LINES = ("-", "--", "-.", (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, GRID = "#222222", "#DDDDDD"
FORMATS = ("png", "pdf", "svg")
# Inches. Scaled to the column of a two-column page (3.3), the smallest text still has 5 points.
WIDTH = 4.8
TITLE, LABEL, TICK = 10, 9, 8  # points


def new_figure(height: float = 3.2, width: float = WIDTH) -> Figure:
    """Return an empty white figure; sizes are in inches."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def line_style(index: int) -> dict[str, Any]:
    """Return color and line style of the run with this index."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": LINES[index % len(LINES)],
    }


def format_axes(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Set title and labels of axes, and apply the common style."""
    # Run names may contain dollar signs, which matplotlib would parse as math.
    axes.set_title(printable(title), fontsize=TITLE, color=INK, parse_math=False)
    axes.set_xlabel(x, fontsize=LABEL, color=INK)
    axes.set_ylabel(printable(y), fontsize=LABEL, color=INK, parse_math=False)
    axes.tick_params(labelsize=TICK, colors=INK, which="both")
    axes.grid(visible=True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(INK)
    axes.patch.set_alpha(0)


def scale(axes: Axes, which: Literal["x", "y"], *, log: bool) -> None:
    """Abbreviate tick labels (``1.5k``) and optionally make the axis logarithmic."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    if log:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(short_number))


def short_number(value: float | int, _: int | None = None) -> str:
    """Format a tick label, with an SI prefix from 1000 on.

    Examples
    --------
    >>> short_number(1500), short_number(0.25), short_number(3e-5)
    ('1.5k', '0.25', '3e-05')
    """
    return EngFormatter(sep="")(value) if abs(value) >= 1e3 else f"{value:.6g}"


def robust_limits(
    curves: Sequence[NDArray[Any]], *, log: bool = False
) -> tuple[float, float] | None:
    """Choose y limits so that the steep start of a loss curve does not compress the rest.

    If the first 5 % of each curve and the highest 5 % of the rest take up more than half of the
    height, they are cut off, provided that a curve has at least 20 points. Values above all first
    values (a diverged run) are cut off too.

    Parameters
    ----------
    curves : sequence of float arrays [n]
        The values in order; non-finite values are ignored.
    log : bool
        Whether the axis is logarithmic.

    Returns
    -------
    (float, float) or None
        Lower and upper limit, with a margin; None if no value is finite.

    Examples
    --------
    >>> falling = np.array([11.0] + [3.0 + 1 / n for n in range(1, 101)])
    >>> low, high = robust_limits([falling])
    >>> 2.9 < low < 3.01 and 3.1 < high < 3.3
    True
    """
    finite = [curve[np.isfinite(curve) & ((not log) | (curve > 0))] for curve in curves]
    finite = [np.log(curve) if log else curve for curve in finite if curve.size]
    if not finite:
        return None
    low = min(float(curve.min()) for curve in finite)
    start = max(float(curve[0]) for curve in finite)
    high = min(max(float(curve.max()) for curve in finite), start)
    rests = [curve[min(max(1, curve.size // 20), curve.size - 1) :] for curve in finite]
    body = max(float(np.quantile(rest, 0.95)) for rest in rests)
    many = max(curve.size for curve in finite) >= 20
    if many and low < body < high and high - low > 2 * (body - low):
        high = body
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    return (float(np.exp(low)), float(np.exp(high))) if log else (low, high)


def limit_y(axes: Axes, curves: Sequence[NDArray[Any]], *, log: bool) -> str | None:
    """Set y limits by `robust_limits`; return a note if they cut off values, else None."""
    limits = robust_limits(curves, log=log)
    if limits is None:
        return None
    axes.set_ylim(*limits)
    highest = max(float(np.nanmax(curve, initial=-np.inf)) for curve in curves)
    return f"cut off above: up to {highest:.3g}" if highest > limits[1] else None


def legend(axes: Axes, *, below: bool = False, title: str | None = None) -> None:
    """Add a legend, inside the axes at the upper right or below the plot."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    common = {"fontsize": TICK, "title": title, "title_fontsize": TICK, "edgecolor": "none"}
    labels = [printable(label) for label in labels]
    if below:
        figure = axes.get_figure()
        assert isinstance(figure, Figure)
        columns = 1 if max(map(len, labels)) > 30 else min(2, len(labels))
        box = figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, handlelength=3.0, **common
        )
    else:
        box = axes.legend(handles, labels, loc="upper right", framealpha=0.7, **common)
    for text in [*box.get_texts(), box.get_title()]:
        text.set_parse_math(False)
        text.set_color(INK)


def check_output_path(out_path: str | Path, name: str = "out_path") -> Path:
    """Return the path of an output file; raises ValueError for an unknown file format.

    `name` is that of the argument or flag, for the message.
    """
    out_path = Path(out_path)
    if out_path.suffix[1:] not in FORMATS:
        raise ValueError(f"{name}: got {out_path}; expected an ending of {', '.join(FORMATS)}")
    return out_path


def save(figure: Figure, out_path: Path) -> None:
    """Write a figure atomically, without timestamps, so that the output is reproducible."""
    content = io.BytesIO()
    kind = out_path.suffix[1:]
    dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    figure.savefig(content, format=kind, dpi=300, metadata=dates.get(kind))
    out_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out_path, content.getvalue())


def printable(text: str) -> str:
    r"""Escape characters that the font lacks, and show newlines and tabs as arrows.

    Examples
    --------
    >>> printable("a\n") == "a\u21b5", printable("\u4e2d") == "\\u4e2d"
    (True, True)
    """
    text = text.replace("\n", "\u21b5").replace("\t", "\u2192")
    return "".join(c if ord(c) in _glyphs() else ascii(c)[1:-1] for c in text)


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
