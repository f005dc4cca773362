"""How every picture looks: sizes, colours, axes, limits, and writing it to a file."""

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

from tjx_metrics.atomic import write_atomically

# Okabe and Ito's colours, told apart also by the colour-blind; the first two are a single run's.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# In grey, runs are told apart by these.
LINES = ("-", "--", "-.", (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, GRID = "#222222", "#DDDDDD"
FORMATS = ("png", "pdf", "svg")
# Inches. Shrunk to the column of a two-column page (3.3) the smallest text still has 5 points.
WIDTH = 4.8
TITLE, LABEL, TICK = 10, 9, 8  # points


def new_figure(height: float = 3.2, width: float = WIDTH) -> Figure:
    """Return an empty figure, sizes in inches, on white paper."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def line_style(index: int) -> dict[str, Any]:
    """Return colour and line of the run that stands at `index`."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": LINES[index % len(LINES)],
    }


def format_axes(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Give axes their title and labels, and the look of all pictures."""
    # Names of runs may hold dollar signs, which are no mathematics.
    axes.set_title(shown(title), fontsize=TITLE, color=INK, parse_math=False)
    axes.set_xlabel(x, fontsize=LABEL, color=INK)
    axes.set_ylabel(shown(y), fontsize=LABEL, color=INK, parse_math=False)
    axes.tick_params(labelsize=TICK, colors=INK, which="both")
    axes.grid(visible=True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(INK)
    axes.patch.set_alpha(0)


def scale(axes: Axes, which: Literal["x", "y"], *, log: bool) -> None:
    """Write the numbers of an axis short (``1.5k``), and make it logarithmic where asked."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(short_number))
    if not log:
        return
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(short_number))


def short_number(value: float | int, _: int | None = None) -> str:
    """Write a tick: thousands and millions by a letter, small numbers in full.

    Examples
    --------
    >>> short_number(1500), short_number(0.25), short_number(3e-5)
    ('1.5k', '0.25', '3e-05')
    """
    return EngFormatter(sep="")(value) if abs(value) >= 1e3 else f"{value:.6g}"


def robust_limits(
    curves: Sequence[NDArray[Any]], *, log: bool = False
) -> tuple[float, float] | None:
    """Choose limits in which the steep start of falling curves does not squash the rest.

    All is shown where the first twentieth of each curve, and the highest twentieth of the rest,
    take up no more than half of the height; otherwise these are cut off, unless no curve
    has 20 points. What rises above all starts (a run that diverged) is cut off too.

    Parameters
    ----------
    curves : sequence of float arrays [n]
        The values, in the order in which they came; what is not finite is left out.
    log : bool
        Whether the axis is logarithmic.

    Returns
    -------
    (float, float) or None
        Lower and upper limit, with a margin; None where nothing is finite.

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
    """Set limits by `robust_limits`; return a note where they cut something off."""
    limits = robust_limits(curves, log=log)
    if limits is None:
        return None
    axes.set_ylim(*limits)
    highest = max(float(np.nanmax(curve, initial=-np.inf)) for curve in curves)
    return f"cut off above: up to {highest:.3g}" if highest > limits[1] else None


def legend(axes: Axes, *, below: bool = False, title: str | None = None) -> None:
    """Name the curves: inside at the upper right, or below the picture where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    common = {"fontsize": TICK, "title": title, "title_fontsize": TICK, "edgecolor": "none"}
    labels = [shown(label) for label in labels]
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


def check_output_path(out_path: str | Path) -> Path:
    """Return the path of a picture; ValueError where its ending is no format of ours."""
    out_path = Path(out_path)
    if out_path.suffix[1:] not in FORMATS:
        raise ValueError(f"out_path={out_path}: must end in one of {', '.join(FORMATS)}")
    return out_path


def save(figure: Figure, out_path: Path) -> None:
    """Write a picture, atomically; the same figure gives the same PNG."""
    picture = io.BytesIO()
    kind = out_path.suffix[1:]
    dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    figure.savefig(picture, format=kind, dpi=300, metadata=dates.get(kind))
    write_atomically(out_path, picture.getvalue())


def shown(text: str) -> str:
    r"""Write a text with what the font has: other characters by their code, line ends as arrows.

    Examples
    --------
    >>> shown("a\n") == "a\u21b5", shown("\u4e2d") == "\\u4e2d"
    (True, True)
    """
    text = text.replace("\n", "\u21b5").replace("\t", "\u2192")
    return "".join(c if ord(c) in _glyphs() else ascii(c)[1:-1] for c in text)


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
