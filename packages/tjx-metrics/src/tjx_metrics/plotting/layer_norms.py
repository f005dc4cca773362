"""Figure of the norms of gradients, parameters or updates of each layer."""

from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from tjx_metrics.plotting.curves import PlotOptions
from tjx_metrics.plotting.run_data import (
    X_LABELS,
    NoDataError,
    RunData,
    RunDataError,
    nearest,
)
from tjx_metrics.plotting.style import (
    INK,
    LABEL,
    TICK,
    format_axes,
    new_figure,
    scale,
    short_number,
)

Kind = Literal["gradient", "parameter", "update"]
_NAMED = 8  # largest number of layers in the legend; with more, the color encodes the depth
_COLORS = "viridis"


def layer_norms(
    run: RunData, kind: Kind, parameter: str | None = None
) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """Collect the recorded norms of each layer.

    Parameters
    ----------
    run : RunData
        The run.
    kind : "gradient", "parameter" or "update"
        Which norms.
    parameter : str or None
        One parameter, or None to combine all parameters of a layer.

    Returns
    -------
    (float64 array [n], dict of float64 arrays [n])
        Steps, and norms by layer name in order of depth: ``blocks 0``, ...; parameters outside of
        layers have their own name (``wte``). NaN if a step has no record.

    Raises
    ------
    RunDataError
        If the run lacks these norms.
    """
    prefix = f"norms/{kind}/"
    paths = [name.removeprefix(prefix) for name in run.names if name.startswith(prefix)]
    if not paths:
        raise NoDataError(
            f"{run.path} has no {prefix}...: record them with --log.layer_norms_every"
        )
    if parameter is not None:
        chosen = [path for path in paths if _parameter(path) == parameter]
        if not chosen:
            near = nearest(parameter, {_parameter(path) for path in paths})
            raise RunDataError(f"{run.name} has no norms of a parameter {parameter!r}; {near}")
        paths = chosen
    series = {path: run.series(prefix + path) for path in paths}
    steps = np.unique(np.concatenate([steps for steps, _ in series.values()]))
    squares: dict[tuple[str, int], NDArray[Any]] = {}
    for path, (at, values) in series.items():
        square = np.full(steps.size, np.nan)
        square[np.searchsorted(steps, at)] = values**2
        total = squares.get(_layer(path))
        squares[_layer(path)] = square if total is None else total + square
    ordered = sorted(squares.items(), key=lambda item: (item[0][1] < 0, item[0]))
    return steps, {
        stack if layer < 0 else f"{stack} {layer}": np.sqrt(square)
        for (stack, layer), square in ordered
    }


def _layer(path: str) -> tuple[str, int]:
    """Return the stack and layer number of a path; the number is -1 outside of layers."""
    parts = path.split("/")
    if not parts[-1].isdigit():
        return parts[0], -1
    blocks = next((i for i, part in enumerate(parts) if "block" in part or "layer" in part), 0)
    return "/".join(parts[: blocks + 1]), int(parts[-1])


def _parameter(path: str) -> str:
    head, _, last = path.rpartition("/")
    return head if last.isdigit() else path


def layer_norms_figure(
    run: RunData,
    options: PlotOptions,
    kind: Kind,
    parameter: str | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the norms of each layer over the steps, as lines and as a heat map."""
    steps, norms = layer_norms(run, kind, parameter)
    x = run.along(steps, options.x)
    if options.log_x:
        norms = {name: values[x > 0] for name, values in norms.items()}
        x = x[x > 0]
    figure = new_figure(3.0 + max(1.2, 0.15 * len(norms)))
    above, below = figure.subplots(
        2, 1, sharex=True, height_ratios=(2.1, max(1.2, 0.15 * len(norms)))
    )
    subject = kind if parameter is None else f"{kind}, {parameter}"
    format_axes(
        above, title=title or f"Norms ({subject}): {run.name}", y=f"{kind.capitalize()} norm"
    )
    _draw_lines(above, x, norms)
    scale(above, "x", log=options.log_x)
    scale(above, "y", log=True)
    _draw_heat_map(below, x, norms, kind)
    format_axes(below, x=X_LABELS[options.x])
    below.grid(visible=False)
    scale(below, "x", log=options.log_x)
    return figure


def _draw_lines(axes: Axes, x: NDArray[Any], norms: dict[str, NDArray[Any]]) -> None:
    """Plot a line per layer, from dark (first) to light (last); others are dashed."""
    layers = [name for name in norms if name[-1].isdigit()]
    colors = matplotlib.colormaps[_COLORS](np.linspace(0.22, 0.9, max(len(layers), 1)))
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.0} if x.size < 15 else {}
    for name, values in norms.items():
        positive = np.where(values > 0, values, np.nan)
        if name in layers:
            color = colors[layers.index(name)]
            axes.plot(x, positive, color=color, linewidth=1.2, label=name, **marker)
        else:
            line = ("--", "-.", ":")[(list(norms).index(name) - len(layers)) % 3]
            axes.plot(x, positive, line, color="#777777", linewidth=1.0, label=name, **marker)
    if len(norms) <= _NAMED:
        figure = axes.get_figure()
        assert isinstance(figure, Figure)
        box = figure.legend(
            *axes.get_legend_handles_labels(),
            fontsize=7, edgecolor="none", loc="outside lower center", ncols=4,
        )  # fmt: skip
        for text in box.get_texts():
            text.set_color(INK)
    else:
        note = "dark to light: first to last layer; grey: others"
        axes.text(0.99, 0.97, note, transform=axes.transAxes, ha="right", va="top",
                  fontsize=7, color=INK)  # fmt: skip


def _draw_heat_map(axes: Axes, x: NDArray[Any], norms: dict[str, NDArray[Any]], kind: Kind) -> None:
    """Plot norms as a heat map, with the first layer at the bottom."""
    values = np.array([np.where(each > 0, each, np.nan) for each in norms.values()])
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise NoDataError(f"the {kind} norms are all zero or not finite: nothing to plot")
    # Quantiles, so that the first steps do not use up the color range.
    low, high = np.quantile(finite, [0.01, 0.99])
    image = axes.pcolormesh(
        cell_edges(x), np.arange(len(norms) + 1) - 0.5, np.ma.masked_invalid(values),
        cmap=_COLORS, norm=LogNorm(low, max(high, low * 1.01)), rasterized=True,
    )  # fmt: skip
    axes.set_yticks(range(len(norms)), labels=list(norms))
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    bar = figure.colorbar(image, ax=axes, extend="both", pad=0.02)
    bar.set_label("Norm", fontsize=LABEL, color=INK)
    bar.ax.tick_params(labelsize=TICK, colors=INK, which="both")
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(short_number))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    few = len(norms) <= 24
    axes.tick_params(axis="y", labelsize=TICK if few else 5)


def cell_edges(x: NDArray[Any]) -> NDArray[np.float64]:
    """Return cell edges around ascending x values: midpoints, extrapolated at both ends.

    Examples
    --------
    >>> cell_edges(np.array([1.0, 3.0, 7.0])).tolist()
    [0.0, 2.0, 5.0, 9.0]
    >>> cell_edges(np.array([4.0])).tolist()
    [3.5, 4.5]
    """
    if x.size == 1:
        return np.array([x[0] - 0.5, x[0] + 0.5])
    middle = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])
