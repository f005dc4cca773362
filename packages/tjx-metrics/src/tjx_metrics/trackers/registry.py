"""The trackers that a run can choose, each behind a thread of its own."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tjx_metrics.trackers.availability import check_trackers
from tjx_metrics.trackers.background import BackgroundTracker
from tjx_metrics.trackers.base import Tracker
from tjx_metrics.trackers.run_id import stored_run_id
from tjx_metrics.trackers.tensorboard import TensorboardTracker
from tjx_metrics.trackers.trackio import TrackioTracker
from tjx_metrics.trackers.wandb import WandbTracker


class TrackedRun(NamedTuple):
    """What a tracker needs to know of a run.

    Attributes
    ----------
    directory : Path
        The run's directory; each tracker has a folder of its own there.
    name : str
        What the run is called.
    project : str
        Which runs it stands beside.
    resume_step : int or None
        Step from which the run goes on; None, or -1, where it begins.
    """

    directory: Path
    name: str
    project: str
    resume_step: int | None


def _tensorboard(run: TrackedRun, first: bool) -> Tracker:
    # Made again after a failure it hides nothing: what it wrote before stands.
    return TensorboardTracker(
        run.directory / "tensorboard", resume_step=run.resume_step if first else None
    )


def _wandb(run: TrackedRun, first: bool) -> Tracker:
    return WandbTracker(
        _run_id(run, "wandb", first), directory=run.directory, project=run.project, name=run.name
    )


def _trackio(run: TrackedRun, first: bool) -> Tracker:
    return TrackioTracker(_run_id(run, "trackio", first), project=run.project, name=run.name)


def _run_id(run: TrackedRun, tracker: str, first: bool) -> str:
    begins = run.resume_step is None or run.resume_step < 0
    return stored_run_id(run.directory / tracker / "run_id.txt", new=first and begins)


# To add one: a line here, its name in `config.py`, its library in `extras.py`.
_TRACKERS: dict[str, Callable[[TrackedRun, bool], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def open_trackers(
    names: Iterable[str],
    directory: str | Path,
    *,
    name: str | None = None,
    project: str = "tjx",
    resume_step: int | None = None,
) -> list[BackgroundTracker]:
    """Open the trackers of a run, which can neither stop it nor hold it up.

    Parameters
    ----------
    names : iterable of str
        tensorboard, wandb, trackio.
    directory : str or Path
        The run's directory.
    name : str or None
        What W&B and Trackio call the run; None is the directory's name.
    project : str
        Which runs it stands beside there.
    resume_step : int or None
        Step from which the run goes on, in the same directory: W&B and Trackio go on with the same
        run, TensorBoard hides what stands of later steps. None, or -1, begins another run.

    Returns
    -------
    list of BackgroundTracker
        In the order of `names`.

    Raises
    ------
    ValueError
        When a name is unknown or stands twice, or its library is not installed.
    """
    names = tuple(names)
    check_trackers(names)
    directory = Path(directory).resolve()
    run = TrackedRun(directory, name or directory.name, project, resume_step)
    return [BackgroundTracker(partial(_TRACKERS[each], run), each) for each in names]
