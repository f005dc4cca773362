"""Figure of histograms of weights, gradients or updates over the steps of a run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from tjx_metrics.plotting.layer_norms import cell_edges
from tjx_metrics.plotting.run_data import (
    X_LABELS,
    NoDataError,
    RunData,
    RunDataError,
    XAxis,
    nearest,
)
from tjx_metrics.plotting.style import (
    INK,
    LABEL,
    TITLE,
    new_figure,
    printable,
    short_number,
)

_PREFIX = "histograms/"
_PANELS = 12
_BINS = 80
_QUANTILES = (0.05, 0.5, 0.95)


def histograms_figure(
    run: RunData,
    names: Sequence[str] | None = None,
    x: XAxis = "steps",
    title: str | None = None,
) -> Figure:
    """Draw histograms as heat maps, with the 5th, 50th and 95th percentiles."""
    found = run.objects(_PREFIX)
    if not found:
        raise NoDataError(f"{run.path} has no histograms")
    for name in names or ():
        if name not in found:
            raise RunDataError(f"{run.name} has no {name!r}; {nearest(name, found)}")
    drawn = list(names) if names else _choose(found)
    columns = min(4, len(drawn))  # even, so that both layers of a parameter share a row
    rows = -(-len(drawn) // columns)
    figure = new_figure(height=0.9 + 1.35 * rows, width=max(3.6, 0.6 + 1.75 * columns))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for name, axes in zip(drawn, grid.flat, strict=False):
        try:
            steps = np.array([step for step, _ in found[name]], np.float64)
            _draw_histograms(axes, run.along(steps, x), [histogram for _, histogram in found[name]])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, RunDataError):
                raise
            raise RunDataError(f"{run.path}: {name} is no histogram ({error})") from error
        label = name.removeprefix(_PREFIX)
        axes.set_title(_break_name(label), fontsize=7, color=INK, parse_math=False)
    for axes in list(grid.flat)[len(drawn) :]:
        axes.set_axis_off()
    of_all = "" if len(drawn) == len(found) else f" ({len(drawn)} of {len(found)})"
    figure.suptitle(
        printable(title or f"Histograms{of_all}: {run.name}"),
        fontsize=TITLE, color=INK, parse_math=False,
    )  # fmt: skip
    figure.supxlabel(X_LABELS[x], fontsize=LABEL, color=INK)
    figure.supylabel("Value", fontsize=LABEL, color=INK)
    return figure


def _choose(found: dict[str, Any]) -> list[str]:
    """Select the first and last layer of the largest parameters, at most `_PANELS` in total."""
    sizes: dict[str, float] = {}
    layers: dict[str, list[str]] = {}
    for name, points in found.items():
        head, _, last = name.rpartition("/")
        parameter = head if last.isdigit() else name
        layers.setdefault(parameter, []).append(name)
        counts = points[-1][1].get("counts", [])
        sizes[parameter] = max(sizes.get(parameter, 0), float(np.sum(counts)))
    chosen: list[str] = []
    for parameter in sorted(layers, key=lambda each: (-sizes[each], each)):
        ordered = sorted(layers[parameter], key=lambda name: (len(name), name))
        ends = [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
        if len(chosen) + len(ends) <= _PANELS:
            chosen += ends
    # Sorted by name, so that both layers of a parameter are adjacent.
    return sorted(chosen, key=lambda name: (name.rpartition("/")[0], len(name), name))


def _draw_histograms(axes: Axes, x: NDArray[Any], histograms: Sequence[dict[str, Any]]) -> None:
    counts = [np.asarray(each["counts"], np.float64) for each in histograms]
    edges = [np.asarray(each["edges"], np.float64) for each in histograms]
    for count, edge in zip(counts, edges, strict=True):
        if count.ndim != 1 or edge.shape != (count.size + 1,) or not count.size:
            raise ValueError(
                f"edges: got shape {edge.shape} for counts of {count.shape}; expected one more"
            )
    quantiles = np.array(
        [histogram_quantiles(c, e, _QUANTILES) for c, e in zip(counts, edges, strict=True)]
    )
    # Limit the y axis to three times the 5-95 % range, so that outliers do not compress it.
    low, high = min(edge[0] for edge in edges), max(edge[-1] for edge in edges)
    full = quantiles[np.isfinite(quantiles).all(axis=1)]
    if full.size:
        inner, outer = full[:, 0].min(), full[:, 2].max()
        margin = max(outer - inner, 1e-12)
        low, high = max(low, inner - margin), min(high, outer + margin)
    grid = np.linspace(low, high if high > low else low + 1e-12, _BINS + 1)
    shares = np.array([resample(c, e, grid) for c, e in zip(counts, edges, strict=True)])
    axes.pcolormesh(
        cell_edges(x), grid, shares.T, cmap="Blues",
        norm=PowerNorm(0.5, 0.0, max(float(shares.max()), 1e-12)), rasterized=True,
    )  # fmt: skip
    for line, values in zip((":", "-", ":"), quantiles.T, strict=True):
        axes.plot(x, values, line, color="#D55E00", linewidth=0.8)
    axes.set_ylim(grid[0], grid[-1])
    axes.tick_params(labelsize=6, length=2, width=0.5, colors=INK)
    axes.spines[:].set_color(INK)
    axes.spines[:].set_linewidth(0.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def resample(counts: NDArray[Any], edges: NDArray[Any], grid: NDArray[Any]) -> NDArray[np.float64]:
    """Resample a histogram to other bins, assuming uniform density inside each bin.

    Parameters
    ----------
    counts : array [bins]
        Number of values in each bin.
    edges : float array [bins + 1]
        Ascending bin edges.
    grid : float array [new_bins + 1]
        Ascending edges of the new bins.

    Returns
    -------
    float64 array [new_bins]
        Fraction of all values in each new bin; 0 for an empty histogram.

    Examples
    --------
    >>> resample(np.array([2, 2]), np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.5, 2.0])).tolist()
    [0.25, 0.75]
    """
    total = max(float(counts.sum()), 1.0)
    below = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)]) / total
    return np.diff(np.interp(grid, edges, below))


def histogram_quantiles(
    counts: NDArray[Any], edges: NDArray[Any], shares: Sequence[float]
) -> NDArray[np.float64]:
    """Compute quantiles of a histogram: float64 [shares], NaN for an empty histogram.

    Examples
    --------
    >>> histogram_quantiles(np.array([1, 3]), np.array([0.0, 1.0, 2.0]), [0.25, 0.625]).tolist()
    [1.0, 1.5]
    """
    below = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    if not below[-1]:
        return np.full(len(shares), np.nan)
    # Remove empty bins, in which the cumulative count is constant and has no inverse.
    keep = np.append(True, np.diff(below) > 0)
    first = int(np.argmax(below > 0)) - 1
    places, values = below[keep], edges[keep]
    values[0] = edges[first]
    return np.asarray(np.interp(np.asarray(shares) * below[-1], places, values))


def _break_name(name: str) -> str:
    """Break a long name at the slash nearest to its middle."""
    parts = printable(name).split("/")
    if len(name) <= 28 or len(parts) < 3:
        return "/".join(parts)
    half = min(range(1, len(parts)), key=lambda i: abs(len("/".join(parts[:i])) - len(name) / 2))
    return "/".join(parts[:half]) + "/\n" + "/".join(parts[half:])
