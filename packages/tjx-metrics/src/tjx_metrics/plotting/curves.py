"""Curves of the loss, the learning rate or any other metric of one or several runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tjx_metrics.plotting.run_data import (
    X_LABELS,
    NoDataError,
    RunData,
    RunDataError,
    Series,
    XAxis,
    nearest,
)
from tjx_metrics.plotting.smoothing import moving_average
from tjx_metrics.plotting.style import (
    COLORS,
    INK,
    MARKERS,
    TICK,
    format_axes,
    legend,
    limit_y,
    line_style,
    new_figure,
    scale,
)

# Labels of the y axis; other metrics are labeled by their name.
LABELS = {
    "train/learning_rate": "Learning rate",
    "train/grad_norm": "Gradient norm",
    "train/param_norm": "Parameter norm",
    "train/tokens_per_sec": "Tokens per second",
    "train/mfu": "MFU",
    "train/skipped": "Skipped steps",
    "eval/perplexity": "Perplexity",
    "eval/bits_per_byte": "Bits per byte",
    "eval/bits_per_token": "Bits per token",
    "memory/device_peak_bytes": "Peak device memory (bytes)",
    "memory/host_peak_bytes": "Peak host memory (bytes)",
    "compile/count": "Compilations",
    "checkpoint/blocking_seconds": "Seconds blocked by a save",
}


@dataclass(frozen=True)
class PlotOptions:
    """Axes and smoothing of curves; the fields are those of `plot_files.CurveOptions`."""

    x: XAxis = "steps"
    window: int | None = None
    log_x: bool = False
    log_y: bool = False

    def smoothing_window(self, count: int) -> int:
        """Return the smoothing window for `count` records."""
        return max(1, count // 25) if self.window is None else self.window

    def with_x(self, run: RunData, series: Series) -> Series:
        """Map the steps of a series to the x axis; drop x <= 0 on a logarithmic axis."""
        x, y = run.along(series[0], self.x), series[1]
        return (x[x > 0], y[x > 0]) if self.log_x else (x, y)

    def format_axes(self, axes: Axes, *, title: str, y: str) -> None:
        """Set title, labels and scales of axes."""
        format_axes(axes, title=title, x=X_LABELS[self.x], y=y)
        scale(axes, "x", log=self.log_x)
        scale(axes, "y", log=self.log_y)
        axes.margins(x=0.02)


def loss_figure(runs: Sequence[RunData], options: PlotOptions, title: str | None = None) -> Figure:
    """Draw the training and evaluation loss."""
    figure = new_figure(3.2 + (0.17 * len(runs) if len(runs) > 1 else 0))
    axes = figure.add_subplot()
    seen: list[NDArray[Any]] = []
    for index, run in enumerate(runs):
        train, evaluation = (
            options.with_x(run, run.series(name)) for name in ("train/loss", "eval/loss")
        )
        if not train[0].size and not evaluation[0].size:
            raise NoDataError(f"{run.path} has neither train/loss nor eval/loss: nothing to plot")
        if len(runs) == 1:
            _draw_single_run(axes, train, evaluation, options)
        else:
            _draw_one_of_several(axes, train, evaluation, options, run.name, index)
        seen += [moving_average(train[1], options.smoothing_window(train[1].size)), evaluation[1]]
        seen += [train[1]] if len(runs) == 1 else []
    options.format_axes(
        axes,
        title=title or (runs[0].name if len(runs) == 1 else "Loss"),
        y="Loss (nats per token)",
    )
    cut = limit_y(axes, seen, log=options.log_y)
    if len(runs) == 1:
        legend(axes, title=cut)
    else:
        lines = "thin: training, marked: evaluation"
        legend(axes, below=True, title=f"{lines}; {cut}" if cut else lines)
    return figure


def _draw_single_run(axes: Axes, train: Series, evaluation: Series, options: PlotOptions) -> None:
    """Plot a single run: its two curves differ in color and markers."""
    steps, losses = train
    if steps.size:
        window = options.smoothing_window(steps.size)
        label = "training"
        if window > 1:
            label += " (light: not smoothed)"
            axes.plot(steps, losses, color=COLORS[0], alpha=0.25, linewidth=0.8)
        smooth = moving_average(losses, window)
        axes.plot(steps, smooth, color=COLORS[0], linewidth=1.4, label=label)
    if evaluation[0].size:
        _draw_evaluation(axes, evaluation, "evaluation", 1, {"color": COLORS[1]})


def _draw_one_of_several(
    axes: Axes, train: Series, evaluation: Series, options: PlotOptions, name: str, index: int
) -> None:
    """Plot one of several runs: its two curves share color and line style."""
    style = line_style(index)
    if train[0].size:
        smooth = moving_average(train[1], options.smoothing_window(train[1].size))
        # The legend names the evaluation curve, if there is one.
        label = "" if evaluation[0].size else name
        width, alpha = (0.8, 0.55) if evaluation[0].size else (1.4, 1.0)
        axes.plot(train[0], smooth, linewidth=width, alpha=alpha, label=label, **style)
    if evaluation[0].size:
        _draw_evaluation(axes, evaluation, name, index, style)


def _draw_evaluation(
    axes: Axes, evaluation: Series, name: str, index: int, style: dict[str, Any]
) -> None:
    finite = evaluation[1][np.isfinite(evaluation[1])]
    lowest = f"lowest {finite.min():.3f}" if finite.size else "never finite"
    axes.plot(
        *evaluation,
        linewidth=1.4,
        marker=MARKERS[index % len(MARKERS)],
        markersize=3.5,
        markevery=max(1, evaluation[0].size // 40),
        label=f"{name} ({lowest})",
        **style,
    )


# Metrics without outliers, whose first value may be far from all others.
_BOUNDED = ("train/reward", "train/pass_rate", "eval/accuracy")


def metric_figure(
    runs: Sequence[RunData], metric: str, options: PlotOptions, title: str | None = None
) -> Figure:
    """Draw one metric."""
    check_metric(runs, metric)
    figure = new_figure(2.6 + (0.17 * len(runs) if len(runs) > 1 else 0))
    axes = figure.add_subplot()
    seen = draw_metric(axes, runs, metric, options)
    label = LABELS.get(metric, metric)
    options.format_axes(axes, title=title or title_of(runs, label), y=label)
    if metric == "train/learning_rate":
        axes.set_ylim(bottom=None if options.log_y else 0)
    elif metric not in _BOUNDED and seen and (cut := limit_y(axes, seen, log=options.log_y)):
        axes.text(
            0.99, 0.97, cut, transform=axes.transAxes, ha="right", va="top", fontsize=TICK,
            color=INK, bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    if len(runs) > 1:
        legend(axes, below=True)
    return figure


def draw_metric(
    axes: Axes, runs: Sequence[RunData], metric: str, options: PlotOptions
) -> list[NDArray[Any]]:
    """Plot a metric of each run that has it; return the plotted values."""
    seen = []
    for index, run in enumerate(runs):
        if metric not in run.names:
            continue
        x, values = options.with_x(run, run.series(metric))
        window = options.smoothing_window(values.size)
        smooth = moving_average(values, window)
        style = line_style(index)
        if window > 1 and len(runs) == 1:
            axes.plot(x, values, color=style["color"], alpha=0.25, linewidth=0.8)
            seen.append(values)
        marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if x.size < 25 else {}
        axes.plot(x, smooth, linewidth=1.4, label=run.name, **marker, **style)
        seen.append(smooth)
    return seen


def check_metric(runs: Sequence[RunData], metric: str) -> None:
    """Raise RunDataError if no run has a metric, listing similar names."""
    known = {name for run in runs for name in run.names}
    if metric not in known:
        which = runs[0].name if len(runs) == 1 else f"none of the {len(runs)} runs"
        has = "has no" if len(runs) == 1 else "has a"
        raise RunDataError(f"{which} {has} metric {metric!r}; {nearest(metric, known)}")


def title_of(runs: Sequence[RunData], label: str) -> str:
    """Return `label`, with the name of the run if there is only one."""
    return f"{label}: {runs[0].name}" if len(runs) == 1 else label
