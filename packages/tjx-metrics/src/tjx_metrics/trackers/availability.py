"""Check that requested trackers exist and that their libraries are installed."""

import importlib.util
from collections.abc import Iterable

from tjx_core import ConfigError, Problem
from tjx_metrics.config import LogConfig

_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def check_trackers(names: Iterable[str]) -> None:
    """Check tracker names and their libraries before a run starts.

    Parameters
    ----------
    names : iterable of str
        Tracker names, as in `LogConfig.trackers`.

    Raises
    ------
    ConfigError
        If a name is unknown or repeated, or a library is not installed; the message contains the
        ``pip install`` command.

    Examples
    --------
    >>> check_trackers(["tensorbord"])
    Traceback (most recent call last):
        ...
    tjx_core.problems.ConfigError: trackers: got 'tensorbord'; expected one of tensorboard, wandb, \
trackio; did you mean tensorboard?
    """
    wanted = LogConfig(trackers=tuple(names)).trackers
    missing = [
        name
        for name in wanted
        if name in _MODULES and importlib.util.find_spec(_MODULES[name]) is None
    ]
    if missing:
        libraries = ", ".join(_MODULES[name] for name in missing)
        message = (
            f"got {','.join(wanted)}; {libraries} is not installed; "
            f"pip install 'tjx-metrics[{','.join(missing)}]', or leave {', '.join(missing)} out"
        )
        raise ConfigError([Problem("trackers", message)])
