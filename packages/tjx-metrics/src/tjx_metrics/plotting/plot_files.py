"""Plots of recorded runs, written to files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from matplotlib.figure import Figure

from tjx_metrics.plotting.curves import PlotOptions, loss_figure, metric_figure
from tjx_metrics.plotting.histograms import histograms_figure
from tjx_metrics.plotting.layer_norms import Kind, layer_norms_figure
from tjx_metrics.plotting.performance import throughput_figure, time_split_figure
from tjx_metrics.plotting.run_data import Paths, XAxis, open_run, open_runs
from tjx_metrics.plotting.style import check_output_path, save


class CurveOptions(TypedDict, total=False):
    """Optional arguments of the functions that plot curves of one or several runs.

    Attributes
    ----------
    labels : sequence of str or None
        Name of each run; None uses the names of the directories.
    title : str or None
        Title; None is what the plot shows, with the name of a single run.
    window : int or None
        Number of records in the centered moving average; None is 1/25 of the records, 1 disables
        smoothing.
    x : "steps", "tokens" or "hours"
        Quantity of the x axis.
    log_x : bool
        Whether the x axis is logarithmic.
    """

    labels: Sequence[str] | None
    title: str | None
    window: int | None
    x: XAxis
    log_x: bool


class MetricOptions(CurveOptions, total=False):
    """`CurveOptions` of one quantity.

    Attributes
    ----------
    log_y : bool
        Whether the y axis is logarithmic.
    """

    log_y: bool


def plot_loss(
    metrics_jsonl_paths: Paths, out_path: str | Path, **options: Unpack[MetricOptions]
) -> None:
    """Plot the training and evaluation loss of one or several runs.

    Parameters
    ----------
    metrics_jsonl_paths : path or sequence of paths
        Files written by `JsonlTracker`, or run directories with a ``metrics.jsonl``.
    out_path : path
        Output file, replaced atomically; ``.png``, ``.pdf`` or ``.svg``.
    **options
        As `MetricOptions`. The training loss is smoothed by default.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    ValueError
        If a run lacks what is plotted or values for the x axis, if the number of labels is not the
        number of runs, or if the file format is unknown.
    """
    _plot_curves(metrics_jsonl_paths, out_path, loss_figure, **options)


def plot_metric(
    metrics_jsonl_paths: Paths,
    metric: str,
    out_path: str | Path,
    **options: Unpack[MetricOptions],
) -> None:
    """Plot one metric of one or several runs, such as ``train/grad_norm``.

    Parameters
    ----------
    metrics_jsonl_paths, out_path
        As for `plot_loss`, as are the errors.
    metric : str
        Name of the metric; at least one run must have it.
    **options
        As `MetricOptions`; `window` is 1 by default.
    """

    def draw(runs: Any, axes: PlotOptions, title: str | None) -> Figure:
        return metric_figure(runs, metric, axes, title)

    given: Any = {"window": 1, **options}
    _plot_curves(metrics_jsonl_paths, out_path, draw, **given)


def plot_learning_rate(
    metrics_jsonl_paths: Paths, out_path: str | Path, **options: Unpack[MetricOptions]
) -> None:
    """Plot the learning rate of one or several runs.

    Parameters
    ----------
    metrics_jsonl_paths, out_path, **options
        As for `plot_metric`, as are the errors.
    """
    plot_metric(metrics_jsonl_paths, "train/learning_rate", out_path, **options)


def plot_throughput(
    metrics_jsonl_paths: Paths, out_path: str | Path, **options: Unpack[CurveOptions]
) -> None:
    """Plot tokens per second, and MFU if recorded.

    Parameters
    ----------
    metrics_jsonl_paths, out_path, **options
        As for `plot_metric`, as are the errors.
    """
    given: Any = {"window": 1, **options}
    _plot_curves(metrics_jsonl_paths, out_path, throughput_figure, log_y=False, **given)


def _plot_curves(
    paths: Paths,
    out_path: str | Path,
    draw: Callable[[Any, PlotOptions, str | None], Figure],
    *,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    **axes: Any,
) -> None:
    out_path = check_output_path(out_path)
    save(draw(open_runs(paths, labels), PlotOptions(**axes), title), out_path)


def plot_time_split(
    metrics_jsonl_path: str | Path,
    out_path: str | Path,
    *,
    title: str | None = None,
    x: XAxis = "steps",
) -> None:
    """Plot the fraction of time in each phase of a run as stacked areas.

    Parameters
    ----------
    metrics_jsonl_path, out_path, title, x
        As for `plot_loss`, of one run, as are the errors.
    """
    out_path = check_output_path(out_path)
    save(time_split_figure(open_run(metrics_jsonl_path), PlotOptions(x), title), out_path)


def plot_layer_norms(
    metrics_jsonl_path: str | Path,
    out_path: str | Path,
    *,
    kind: Kind = "gradient",
    parameter: str | None = None,
    title: str | None = None,
    x: XAxis = "steps",
    log_x: bool = False,
) -> None:
    """Plot the norms of each layer over the steps, as lines and as a heat map.

    Parameters
    ----------
    metrics_jsonl_path, out_path, title, x, log_x
        As for `plot_loss`, of one run, as are the errors.
    kind : "gradient", "parameter" or "update"
        Which norms.
    parameter : str or None
        Path of one parameter, such as ``blocks/mlp/up/kernel``; None combines all parameters of a
        layer (root of the sum of squares).
    """
    out_path = check_output_path(out_path)
    run = open_run(metrics_jsonl_path)
    save(layer_norms_figure(run, PlotOptions(x, log_x=log_x), kind, parameter, title), out_path)


def plot_histograms(
    metrics_jsonl_path: str | Path,
    out_path: str | Path,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    x: XAxis = "steps",
) -> None:
    """Plot histograms over the steps as heat maps, with the 5th, 50th and 95th percentiles.

    Parameters
    ----------
    metrics_jsonl_path, out_path, title, x
        As for `plot_loss`, of one run, as are the errors.
    names : sequence of str or None
        Histograms, such as ``histograms/parameter/blocks/mlp/up/kernel/3``; None selects the first
        and last layer of the largest parameters, at most 12.
    """
    out_path = check_output_path(out_path)
    save(histograms_figure(open_run(metrics_jsonl_path), names, x, title), out_path)
