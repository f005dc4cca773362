"""How the values of weights, gradients or updates spread, over the steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from tjx_metrics.plotting.layer_norms import edges_between
from tjx_metrics.plotting.run_data import (
    X_LABELS,
    NoDataError,
    RunData,
    RunDataError,
    XAxis,
    nearest,
    open_run,
)
from tjx_metrics.plotting.style import (
    INK,
    LABEL,
    TITLE,
    check_output_path,
    new_figure,
    save,
    short_number,
    shown,
)

_PREFIX = "histograms/"
_PANELS = 12
_BINS = 80
_QUANTILES = (0.05, 0.5, 0.95)


def plot_histograms(
    metrics_jsonl_path: str | Path,
    out_path: str | Path,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    x: XAxis = "steps",
) -> None:
    """Draw histograms over the steps: how many values are where is the darkness.

    The lines are the 5th, 50th and 95th percentile.

    Parameters
    ----------
    metrics_jsonl_path : path
        A file that `JsonlTracker` wrote, or a run folder with a ``metrics.jsonl``.
    out_path : path
        The picture, replaced atomically; ``.png``, ``.pdf`` or ``.svg``.
    names : sequence of str or None
        Histograms, such as ``histograms/parameter/blocks/mlp/up/kernel/3``; None is the first and
        last layer of the largest parameters, 12 at most.
    title : str or None
        Title; None says how many are shown, and the name of the run.
    x : "steps", "tokens" or "hours"
        What stands at the x axis.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    ValueError
        When the run has no such histogram, or not what the axis needs, or for another format.
    """
    out_path = check_output_path(out_path)
    save(histograms_figure(open_run(metrics_jsonl_path), names, x, title), out_path)


def histograms_figure(
    run: RunData,
    names: Sequence[str] | None = None,
    x: XAxis = "steps",
    title: str | None = None,
) -> Figure:
    """Draw what `plot_histograms` writes."""
    found = run.objects(_PREFIX)
    if not found:
        raise NoDataError(f"{run.path} has no histograms")
    for name in names or ():
        if name not in found:
            raise RunDataError(f"{run.name} has no {name!r}; {nearest(name, found)}")
    drawn = list(names) if names else _choose(found)
    columns = min(4, len(drawn))  # the two ends of a parameter stay in a row
    rows = -(-len(drawn) // columns)
    figure = new_figure(height=0.9 + 1.35 * rows, width=max(3.6, 0.6 + 1.75 * columns))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for name, axes in zip(drawn, grid.flat, strict=False):
        try:
            steps = np.array([step for step, _ in found[name]], np.float64)
            _draw(axes, run.along(steps, x), [histogram for _, histogram in found[name]])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, RunDataError):
                raise
            raise RunDataError(f"{run.path}: {name} is no histogram ({error})") from error
        label = name.removeprefix(_PREFIX)
        axes.set_title(_broken(label), fontsize=7, color=INK, parse_math=False)
    for axes in list(grid.flat)[len(drawn) :]:
        axes.set_axis_off()
    of_all = "" if len(drawn) == len(found) else f" ({len(drawn)} of {len(found)})"
    figure.suptitle(
        shown(title or f"Histograms{of_all}: {run.name}"),
        fontsize=TITLE, color=INK, parse_math=False,
    )  # fmt: skip
    figure.supxlabel(X_LABELS[x], fontsize=LABEL, color=INK)
    figure.supylabel("Value", fontsize=LABEL, color=INK)
    return figure


def _choose(found: dict[str, Any]) -> list[str]:
    """Choose the first and last layer of the parameters with the most values."""
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
        of_it = sorted(layers[parameter], key=lambda name: (len(name), name))
        ends = [of_it[0], of_it[-1]] if len(of_it) > 1 else of_it
        if len(chosen) + len(ends) <= _PANELS:
            chosen += ends
    # In order of name, so that the two ends of a parameter stand side by side.
    return sorted(chosen, key=lambda name: (name.rpartition("/")[0], len(name), name))


def _draw(axes: Axes, x: NDArray[Any], histograms: Sequence[dict[str, Any]]) -> None:
    counts = [np.asarray(each["counts"], np.float64) for each in histograms]
    edges = [np.asarray(each["edges"], np.float64) for each in histograms]
    for count, edge in zip(counts, edges, strict=True):
        if count.ndim != 1 or edge.shape != (count.size + 1,) or not count.size:
            raise ValueError(f"{count.shape} counts and {edge.shape} edges")
    quantiles = np.array(
        [histogram_quantiles(c, e, _QUANTILES) for c, e in zip(counts, edges, strict=True)]
    )
    # A few far values must not squash the rest: three times what holds nine tenths, at most.
    low, high = min(edge[0] for edge in edges), max(edge[-1] for edge in edges)
    full = quantiles[np.isfinite(quantiles).all(axis=1)]
    if full.size:
        inner, outer = full[:, 0].min(), full[:, 2].max()
        reach = max(outer - inner, 1e-12)
        low, high = max(low, inner - reach), min(high, outer + reach)
    grid = np.linspace(low, high if high > low else low + 1e-12, _BINS + 1)
    shares = np.array([rebinned(c, e, grid) for c, e in zip(counts, edges, strict=True)])
    axes.pcolormesh(
        edges_between(x), grid, shares.T, cmap="Blues",
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


def rebinned(counts: NDArray[Any], edges: NDArray[Any], grid: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the shares of values in other bins, even inside each old one.

    Parameters
    ----------
    counts : array [bins]
        How many values each bin holds.
    edges : float array [bins + 1]
        Its edges, ascending.
    grid : float array [others + 1]
        Edges of the other bins, ascending.

    Returns
    -------
    float64 array [others]
        Shares of all values; 0 where there are none.

    Examples
    --------
    >>> rebinned(np.array([2, 2]), np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.5, 2.0])).tolist()
    [0.25, 0.75]
    """
    total = max(float(counts.sum()), 1.0)
    below = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)]) / total
    return np.diff(np.interp(grid, edges, below))


def histogram_quantiles(
    counts: NDArray[Any], edges: NDArray[Any], shares: Sequence[float]
) -> NDArray[np.float64]:
    """Compute values below which these shares of all lie; float64 [shares], NaN for none.

    Examples
    --------
    >>> histogram_quantiles(np.array([1, 3]), np.array([0.0, 1.0, 2.0]), [0.25, 0.625]).tolist()
    [1.0, 1.5]
    """
    below = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    if not below[-1]:
        return np.full(len(shares), np.nan)
    # Empty bins are taken out: in them any value would do.
    keep = np.append(True, np.diff(below) > 0)
    first = int(np.argmax(below > 0)) - 1
    places, values = below[keep], edges[keep]
    values[0] = edges[first]
    return np.asarray(np.interp(np.asarray(shares) * below[-1], places, values))


def _broken(name: str) -> str:
    """Break a long name at its middle stroke."""
    parts = shown(name).split("/")
    if len(name) <= 28 or len(parts) < 3:
        return "/".join(parts)
    half = min(range(1, len(parts)), key=lambda i: abs(len("/".join(parts[:i])) - len(name) / 2))
    return "/".join(parts[:half]) + "/\n" + "/".join(parts[half:])
