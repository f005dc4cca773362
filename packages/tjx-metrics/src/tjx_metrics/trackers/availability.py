"""Libraries that only some trackers need: extras of this package."""

import importlib.util
from collections.abc import Iterable

from tjx_metrics.config import LogConfig

_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def check_trackers(names: Iterable[str]) -> None:
    """Say what is wrong with the trackers asked for, before a run begins.

    Parameters
    ----------
    names : iterable of str
        Trackers, as `LogConfig` has them.

    Raises
    ------
    ValueError
        When a name is unknown or stands twice, or its library is not installed; the message has
        the command that installs what is missing.

    Examples
    --------
    >>> refuse_trackers(["tensorbord"])
    Traceback (most recent call last):
        ...
    ValueError: trackers=tensorbord: there is no such tracker; did you mean tensorboard? \
(there are tensorboard, wandb, trackio)
    """
    wanted = LogConfig(trackers=tuple(names)).trackers
    missing = [name for name in wanted if importlib.util.find_spec(_MODULES[name]) is None]
    if missing:
        libraries = ", ".join(_MODULES[name] for name in missing)
        raise ValueError(
            f"trackers={','.join(wanted)}: {libraries} is not installed; "
            f"pip install 'tjx-metrics[{','.join(missing)}]', or leave {', '.join(missing)} out"
        )
