"""All pictures of a run, in the order in which they are looked at."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from tjx_metrics.plotting.curves import View, loss_figure, metric_figure, title_of
from tjx_metrics.plotting.histograms import histograms_figure
from tjx_metrics.plotting.layers import layer_norms_figure
from tjx_metrics.plotting.run_data import NoDataError, RunData
from tjx_metrics.plotting.speed import throughput_figure, time_split_figure


@dataclass(frozen=True)
class Picture:
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


def pictures_of(runs: Sequence[RunData], view: View) -> Iterator[Picture]:
    """Yield all pictures of runs: curves of all together, the rest of each.

    Parameters
    ----------
    runs : sequence of RunData
        The runs.
    view : View
        How curves are looked at.
    """
    raw = View(view.x, view.window or 1, view.log_x)
    yield Picture("loss", "Loss", lambda: loss_figure(runs, view, title_of(runs, "Loss")))
    yield Picture("learning_rate", "Learning rate", lambda: curve(runs, "train/learning_rate", raw))
    yield Picture("grad_norm", "Norm of the gradient", lambda: curve(runs, "train/grad_norm", view))
    yield Picture("throughput", "Throughput", lambda: throughput_figure(runs, raw))
    for run in runs:
        yield from _of_one(run, raw, "" if len(runs) == 1 else f"{run.name.replace('/', '_')}_")


def _of_one(run: RunData, view: View, prefix: str) -> Iterator[Picture]:
    yield Picture(f"{prefix}time_split", "Time", lambda: time_split_figure(run, view))
    yield Picture(
        f"{prefix}norms_gradient", "Norms of gradients by layer",
        lambda: layer_norms_figure(run, view, "gradient"),
    )  # fmt: skip
    yield Picture(
        f"{prefix}norms_parameter", "Norms of parameters by layer",
        lambda: layer_norms_figure(run, view, "parameter"),
    )  # fmt: skip
    yield Picture(
        f"{prefix}norms_update", "Norms of updates by layer",
        lambda: layer_norms_figure(run, view, "update"),
    )  # fmt: skip
    yield Picture(f"{prefix}histograms", "Histograms", lambda: histograms_figure(run, None, view.x))


def curve(runs: Sequence[RunData], metric: str, view: View) -> Figure:
    """Draw a metric that runs need not have; NoDataError where none has it."""
    if not any(metric in run.names for run in runs):
        raise NoDataError(f"no record of {metric}")
    return metric_figure(runs, metric, view)
