"""All plots of one or several runs, in display order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from tjx_metrics.plotting.curves import PlotOptions, loss_figure, metric_figure, title_of
from tjx_metrics.plotting.histograms import histograms_figure
from tjx_metrics.plotting.layer_norms import layer_norms_figure
from tjx_metrics.plotting.performance import throughput_figure, time_split_figure
from tjx_metrics.plotting.run_data import NoDataError, RunData


@dataclass(frozen=True)
class Plot:
    """A plot that can be drawn.

    Attributes
    ----------
    name : str
        File name without extension.
    heading : str
        Title in a report.
    draw : callable
        Returns the figure; raises NoDataError if the runs lack the records.
    """

    name: str
    heading: str
    draw: Callable[[], Figure]


def run_plots(runs: Sequence[RunData], options: PlotOptions) -> Iterator[Plot]:
    """Yield all plots of runs: curves of all runs together, then the other plots of each run.

    Parameters
    ----------
    runs : sequence of RunData
        The runs.
    options : PlotOptions
        Axes and smoothing of the curves.
    """
    raw = PlotOptions(options.x, options.window or 1, options.log_x)

    def metric(name: str, options: PlotOptions) -> Figure:
        if not any(name in run.names for run in runs):
            raise NoDataError(f"no record of {name}")
        return metric_figure(runs, name, options)

    yield Plot("loss", "Loss", lambda: loss_figure(runs, options, title_of(runs, "Loss")))
    yield Plot("learning_rate", "Learning rate", lambda: metric("train/learning_rate", raw))
    yield Plot("grad_norm", "Gradient norm", lambda: metric("train/grad_norm", options))
    yield Plot("reward", "Reward", lambda: metric("train/reward", options))
    yield Plot("accuracy", "Accuracy of held-out responses", lambda: metric("eval/accuracy", raw))
    yield Plot("throughput", "Throughput", lambda: throughput_figure(runs, raw))
    for run in runs:
        prefix = "" if len(runs) == 1 else f"{run.name.replace('/', '_')}_"
        yield from _plots_of_one_run(run, raw, prefix)


def _plots_of_one_run(run: RunData, options: PlotOptions, prefix: str) -> Iterator[Plot]:
    yield Plot(f"{prefix}time_split", "Time", lambda: time_split_figure(run, options))
    yield Plot(
        f"{prefix}norms_gradient", "Gradient norms by layer",
        lambda: layer_norms_figure(run, options, "gradient"),
    )  # fmt: skip
    yield Plot(
        f"{prefix}norms_parameter", "Parameter norms by layer",
        lambda: layer_norms_figure(run, options, "parameter"),
    )  # fmt: skip
    yield Plot(
        f"{prefix}norms_update", "Update norms by layer",
        lambda: layer_norms_figure(run, options, "update"),
    )  # fmt: skip
    yield Plot(f"{prefix}histograms", "Histograms", lambda: histograms_figure(run, None, options.x))
