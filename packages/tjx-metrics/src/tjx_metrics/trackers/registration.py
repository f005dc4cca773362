"""Trackers that other packages add. Standard library only: `LogConfig` reads it without NumPy."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tjx_core import ConfigError, Problem

if TYPE_CHECKING:
    from tjx_metrics.trackers.base import Tracker

# In addition to the console and metrics.jsonl, which every run has.
TRACKERS = ("tensorboard", "wandb", "trackio")


class TrackedRun(NamedTuple):
    """Run metadata that trackers need.

    Attributes
    ----------
    directory : Path
        Run directory; each tracker has its own folder in it.
    name : str
        Name of the run.
    project : str
        Project that the run belongs to.
    resume_step : int or None
        Step from which the run resumes; None or -1 for a new run.
    recreated : bool
        Whether the tracker replaces one that failed in this process: it must keep all records.
    """

    directory: Path
    name: str
    project: str
    resume_step: int | None
    recreated: bool = False


registered_trackers: "dict[str, Callable[[TrackedRun], Tracker]]" = {}


def register_tracker(name: str, make_tracker: "Callable[[TrackedRun], Tracker]") -> None:
    """Add a tracker that `LogConfig.trackers` and `open_trackers` select by name.

    `open_trackers` runs it in a background thread: it may block or fail without stopping the run.

    Parameters
    ----------
    name : str
        The name. Registering a name again replaces the entry, unless it is built in.
    make_tracker : callable
        From a `TrackedRun` to a `Tracker`. Called in the background thread, and again after the
        tracker raised an exception.

    Raises
    ------
    ConfigError
        If the name is that of a built-in tracker, is empty, or contains a comma.

    Examples
    --------
    >>> from tjx_metrics import CompositeTracker, LogConfig, register_tracker
    >>> register_tracker("silent", lambda run: CompositeTracker([]))
    >>> LogConfig(trackers=("silent",)).trackers
    ('silent',)
    """
    if not name or "," in name or name in TRACKERS:
        message = (
            f"got {name!r}; expected a name without commas that is not built in "
            f"({', '.join(TRACKERS)}); choose another"
        )
        raise ConfigError([Problem("name", message)])
    registered_trackers[name] = make_tracker


def tracker_names() -> tuple[str, ...]:
    """Return the names of all trackers, built in and registered."""
    return (*TRACKERS, *registered_trackers)
