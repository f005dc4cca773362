"""Open the trackers that a run configures, each in a background thread."""

import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from tjx_core import write_atomically
from tjx_metrics.trackers.availability import check_trackers
from tjx_metrics.trackers.background import BackgroundTracker
from tjx_metrics.trackers.base import Tracker
from tjx_metrics.trackers.registration import TrackedRun, registered_trackers
from tjx_metrics.trackers.tensorboard import TensorboardTracker
from tjx_metrics.trackers.trackio import TrackioTracker
from tjx_metrics.trackers.wandb import WandbTracker


def _tensorboard(run: TrackedRun) -> Tracker:
    # A tracker recreated after a failure must not hide what it wrote before.
    return TensorboardTracker(
        run.directory / "tensorboard", resume_step=None if run.recreated else run.resume_step
    )


def _wandb(run: TrackedRun) -> Tracker:
    return WandbTracker(
        _run_id(run, "wandb"), directory=run.directory, project=run.project, name=run.name
    )


def _trackio(run: TrackedRun) -> Tracker:
    return TrackioTracker(_run_id(run, "trackio"), project=run.project, name=run.name)


def _run_id(run: TrackedRun, tracker: str) -> str:
    """Return the run id (32 hexadecimal digits) stored in the run directory, or store a new one."""
    path = run.directory / tracker / "run_id.txt"
    is_new = not run.recreated and (run.resume_step is None or run.resume_step < 0)
    if not is_new and path.exists():
        return path.read_text().strip()
    run_id = uuid.uuid4().hex
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{run_id}\n")
    return run_id


# A built-in tracker: a line here, its name in `registration.py`, its library in `availability.py`.
_TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
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
    """Open trackers by name, wrapped so that they can neither stop nor block the run.

    Parameters
    ----------
    names : iterable of str
        tensorboard, wandb, trackio, and those of `register_tracker`.
    directory : str or Path
        Run directory.
    name : str or None
        Name of the run in W&B and Trackio; None is the name of the directory.
    project : str
        Project in W&B and Trackio.
    resume_step : int or None
        Step from which the run in this directory resumes: W&B and Trackio continue the same run,
        TensorBoard hides records of later steps. None or -1 starts a new run.

    Returns
    -------
    list of BackgroundTracker
        In the order of `names`.

    Raises
    ------
    ConfigError
        If a name is unknown or repeated, or its library is not installed.
    """
    names = tuple(names)
    check_trackers(names)
    directory = Path(directory).resolve()
    run = TrackedRun(directory, name or directory.name, project, resume_step)
    return [BackgroundTracker(_maker(each, run), each) for each in names]


def _maker(name: str, run: TrackedRun) -> Callable[[bool], Tracker]:
    make = {**_TRACKERS, **registered_trackers}[name]
    return lambda first: make(run._replace(recreated=not first))
