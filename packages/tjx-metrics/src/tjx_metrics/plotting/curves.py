"""Curves of one run or of many: the loss, the learning rate, any metric."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tjx_metrics.plotting.run_data import (
    X_LABELS,
    NoDataError,
    Paths,
    RunData,
    RunDataError,
    Series,
    XAxis,
    nearest,
    open_runs,
)
from tjx_metrics.plotting.smoothing import moving_average
from tjx_metrics.plotting.style import (
    COLORS,
    INK,
    MARKERS,
    TICK,
    check_output_path,
    format_axes,
    legend,
    limit_y,
    line_style,
    new_figure,
    save,
    scale,
)

# What stands at the y axis; other metrics stand there by their name.
LABELS = {
    "train/learning_rate": "Learning rate",
    "train/grad_norm": "Norm of the gradient",
    "train/param_norm": "Norm of the parameters",
    "train/tokens_per_sec": "Tokens per second",
    "train/mfu": "MFU",
    "train/skipped": "Skipped steps",
    "eval/perplexity": "Perplexity",
    "eval/bits_per_byte": "Bits per byte",
    "eval/bits_per_token": "Bits per token",
    "memory/device_peak_bytes": "Peak memory of a device (bytes)",
    "memory/host_peak_bytes": "Peak memory of the host (bytes)",
    "compile/count": "Compilations",
    "checkpoint/blocking_seconds": "Seconds that a save held the run up",
}


@dataclass(frozen=True)
class PlotOptions:
    """How curves are looked at: see `plot_metric`."""

    x: XAxis = "steps"
    window: int | None = None
    log_x: bool = False
    log_y: bool = False

    def width(self, count: int) -> int:
        """Return the number of records that are averaged, of so many."""
        return max(1, count // 25) if self.window is None else self.window

    def place(self, run: RunData, series: Series) -> Series:
        """Put a series on the x axis; what a logarithmic axis cannot show is left out."""
        x, y = run.along(series[0], self.x), series[1]
        return (x[x > 0], y[x > 0]) if self.log_x else (x, y)

    def format_axes(self, axes: Axes, *, title: str, y: str) -> None:
        """Label the axes."""
        format_axes(axes, title=title, x=X_LABELS[self.x], y=y)
        scale(axes, "x", log=self.log_x)
        scale(axes, "y", log=self.log_y)
        axes.margins(x=0.02)


def plot_loss(
    metrics_jsonl_paths: Paths,
    out_path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    window: int | None = None,
    x: XAxis = "steps",
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Draw the training and evaluation loss of one run or of several.

    Parameters
    ----------
    metrics_jsonl_paths : path or sequence of paths
        Files that `JsonlTracker` wrote, or run folders with a ``metrics.jsonl``.
    out_path : path
        The picture, replaced atomically; ``.png``, ``.pdf`` or ``.svg``.
    labels : sequence of str or None
        Name of each run; None takes the names of their folders.
    title : str or None
        Title; None is the name of a single run, and "Loss" for several.
    window : int or None
        Records over which the training loss is averaged, centred; None is 1/25 of the run, 1 is
        no smoothing.
    x : "steps", "tokens" or "hours"
        What stands at the x axis.
    log_x, log_y : bool
        Whether an axis is logarithmic.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    ValueError
        When a file has neither ``train/loss`` nor ``eval/loss``, or not what the axis needs, when
        the number of labels is not that of the runs, or for another format.
    """
    out_path = check_output_path(out_path)
    runs = open_runs(metrics_jsonl_paths, labels)
    save(loss_figure(runs, PlotOptions(x, window, log_x, log_y), title), out_path)


def loss_figure(runs: Sequence[RunData], view: PlotOptions, title: str | None = None) -> Figure:
    """Draw what `plot_loss` writes."""
    figure = new_figure(3.2 + (0.17 * len(runs) if len(runs) > 1 else 0))
    axes = figure.add_subplot()
    seen: list[NDArray[Any]] = []
    for index, run in enumerate(runs):
        train, evaluation = (
            view.place(run, run.series(name)) for name in ("train/loss", "eval/loss")
        )
        if not train[0].size and not evaluation[0].size:
            raise NoDataError(f"{run.path} has neither train/loss nor eval/loss: nothing to draw")
        if len(runs) == 1:
            _draw_alone(axes, train, evaluation, view)
        else:
            _draw_among(axes, train, evaluation, view, run.name, index)
        seen += [moving_average(train[1], view.width(train[1].size)), evaluation[1]]
        seen += [train[1]] if len(runs) == 1 else []
    view.format_axes(
        axes,
        title=title or (runs[0].name if len(runs) == 1 else "Loss"),
        y="Loss (nats per token)",
    )
    cut = limit_y(axes, seen, log=view.log_y)
    if len(runs) == 1:
        legend(axes, title=cut)
    else:
        lines = "thin: training, marked: evaluation"
        legend(axes, below=True, title=f"{lines}; {cut}" if cut else lines)
    return figure


def _draw_alone(axes: Axes, train: Series, evaluation: Series, view: PlotOptions) -> None:
    """Draw a run whose two curves are told apart by colour and marks."""
    steps, losses = train
    if steps.size:
        width = view.width(steps.size)
        label = "training"
        if width > 1:
            label += " (light: not smoothed)"
            axes.plot(steps, losses, color=COLORS[0], alpha=0.25, linewidth=0.8)
        axes.plot(steps, moving_average(losses, width), color=COLORS[0], linewidth=1.4, label=label)
    if evaluation[0].size:
        _draw_evaluation(axes, evaluation, "evaluation", 1, {"color": COLORS[1]})


def _draw_among(
    axes: Axes, train: Series, evaluation: Series, view: PlotOptions, name: str, index: int
) -> None:
    """Draw a run whose two curves have the same colour and line."""
    look = line_style(index)
    if train[0].size:
        smooth = moving_average(train[1], view.width(train[1].size))
        # The name stands at the evaluation where there is one.
        label = "" if evaluation[0].size else name
        width, alpha = (0.8, 0.55) if evaluation[0].size else (1.4, 1.0)
        axes.plot(train[0], smooth, linewidth=width, alpha=alpha, label=label, **look)
    if evaluation[0].size:
        _draw_evaluation(axes, evaluation, name, index, look)


def _draw_evaluation(
    axes: Axes, evaluation: Series, name: str, index: int, look: dict[str, Any]
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
        **look,
    )


def plot_metric(
    metrics_jsonl_paths: Paths,
    metric: str,
    out_path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    window: int | None = 1,
    x: XAxis = "steps",
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Draw any metric of one run or of several.

    Parameters
    ----------
    metrics_jsonl_paths : path or sequence of paths
        Files that `JsonlTracker` wrote, or run folders with a ``metrics.jsonl``.
    metric : str
        Its name, such as ``train/grad_norm``.
    out_path : path
        The picture, replaced atomically; ``.png``, ``.pdf`` or ``.svg``.
    labels : sequence of str or None
        Name of each run; None takes the names of their folders.
    title : str or None
        Title; None is the metric, with the name of a single run.
    window : int or None
        Records that are averaged, centred; None is 1/25 of the run, 1 is no smoothing.
    x : "steps", "tokens" or "hours"
        What stands at the x axis.
    log_x, log_y : bool
        Whether an axis is logarithmic.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    ValueError
        When no run has the metric, or one has not what the axis needs, when the number of labels
        is not that of the runs, or for another format.
    """
    out_path = check_output_path(out_path)
    runs = open_runs(metrics_jsonl_paths, labels)
    save(metric_figure(runs, metric, PlotOptions(x, window, log_x, log_y), title), out_path)


def plot_learning_rate(
    metrics_jsonl_paths: Paths,
    out_path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    x: XAxis = "steps",
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Draw the learning rate of one run or of several; the parameters are those of `plot_metric`.

    Raises
    ------
    FileNotFoundError, ValueError
        As `plot_metric`.
    """
    plot_metric(
        metrics_jsonl_paths, "train/learning_rate", out_path,
        labels=labels, title=title, x=x, log_x=log_x, log_y=log_y,
    )  # fmt: skip


def metric_figure(
    runs: Sequence[RunData], metric: str, view: PlotOptions, title: str | None = None
) -> Figure:
    """Draw what `plot_metric` writes."""
    check_metric(runs, metric)
    figure = new_figure(2.6 + (0.17 * len(runs) if len(runs) > 1 else 0))
    axes = figure.add_subplot()
    seen = draw_metric(axes, runs, metric, view)
    label = LABELS.get(metric, metric)
    view.format_axes(axes, title=title or title_of(runs, label), y=label)
    if metric == "train/learning_rate":
        axes.set_ylim(bottom=None if view.log_y else 0)
    elif seen and (cut := limit_y(axes, seen, log=view.log_y)):
        axes.text(
            0.99, 0.97, cut, transform=axes.transAxes, ha="right", va="top", fontsize=TICK,
            color=INK, bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    if len(runs) > 1:
        legend(axes, below=True)
    return figure


def draw_metric(
    axes: Axes, runs: Sequence[RunData], metric: str, view: PlotOptions
) -> list[NDArray[Any]]:
    """Draw a metric of each run that has it, and return the values that were drawn."""
    seen = []
    for index, run in enumerate(runs):
        if metric not in run.names:
            continue
        x, values = view.place(run, run.series(metric))
        smooth = moving_average(values, view.width(values.size))
        look = line_style(index)
        if view.width(values.size) > 1 and len(runs) == 1:
            axes.plot(x, values, color=look["color"], alpha=0.25, linewidth=0.8)
            seen.append(values)
        mark: dict[str, Any] = {"marker": "o", "markersize": 3.5} if x.size < 25 else {}
        axes.plot(x, smooth, linewidth=1.4, label=run.name, **mark, **look)
        seen.append(smooth)
    return seen


def check_metric(runs: Sequence[RunData], metric: str) -> None:
    """Raise RunError where no run has a metric, with the names that come nearest."""
    known = {name for run in runs for name in run.names}
    if metric not in known:
        which = runs[0].name if len(runs) == 1 else f"none of the {len(runs)} runs"
        has = "has no" if len(runs) == 1 else "has a"
        raise RunDataError(f"{which} {has} metric {metric!r}; {nearest(metric, known)}")


def title_of(runs: Sequence[RunData], label: str) -> str:
    """Return a title: what is shown, and whose it is where that is one run."""
    return f"{label}: {runs[0].name}" if len(runs) == 1 else label
