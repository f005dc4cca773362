"""All pictures of a run, in the order in which they are looked at."""

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
    """A picture that can be drawn of runs.

    Parameters
    ----------
    name : str
        Name of its file, without ending.
    heading : str
        What it shows.
    draw : callable
        Draws it; NoDataError where the runs have no such records.
    """

    name: str
    heading: str
    draw: Callable[[], Figure]


def run_plots(runs: Sequence[RunData], view: PlotOptions) -> Iterator[Plot]:
    """Yield all pictures of runs: curves of all together, the rest of each.

    Parameters
    ----------
    runs : sequence of RunData
        The runs.
    view : View
        How curves are looked at.
    """
    raw = PlotOptions(view.x, view.window or 1, view.log_x)
    yield Plot("loss", "Loss", lambda: loss_figure(runs, view, title_of(runs, "Loss")))
    yield Plot("learning_rate", "Learning rate", lambda: curve(runs, "train/learning_rate", raw))
    yield Plot("grad_norm", "Norm of the gradient", lambda: curve(runs, "train/grad_norm", view))
    yield Plot("throughput", "Throughput", lambda: throughput_figure(runs, raw))
    for run in runs:
        yield from _of_one(run, raw, "" if len(runs) == 1 else f"{run.name.replace('/', '_')}_")


def _of_one(run: RunData, view: PlotOptions, prefix: str) -> Iterator[Plot]:
    yield Plot(f"{prefix}time_split", "Time", lambda: time_split_figure(run, view))
    yield Plot(
        f"{prefix}norms_gradient", "Norms of gradients by layer",
        lambda: layer_norms_figure(run, view, "gradient"),
    )  # fmt: skip
    yield Plot(
        f"{prefix}norms_parameter", "Norms of parameters by layer",
        lambda: layer_norms_figure(run, view, "parameter"),
    )  # fmt: skip
    yield Plot(
        f"{prefix}norms_update", "Norms of updates by layer",
        lambda: layer_norms_figure(run, view, "update"),
    )  # fmt: skip
    yield Plot(f"{prefix}histograms", "Histograms", lambda: histograms_figure(run, None, view.x))


def curve(runs: Sequence[RunData], metric: str, view: PlotOptions) -> Figure:
    """Draw a metric that runs need not have; NoDataError where none has it."""
    if not any(metric in run.names for run in runs):
        raise NoDataError(f"no record of {metric}")
    return metric_figure(runs, metric, view)
