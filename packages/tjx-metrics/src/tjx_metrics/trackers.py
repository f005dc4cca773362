"""What a tracker is, and several as one."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, SupportsFloat, runtime_checkable

import numpy as np

# Numbers of Python, NumPy and JAX alike. To read a JAX scalar waits for the device: fetch metrics
# a step late.
Scalar = SupportsFloat


@runtime_checkable
class Tracker(Protocol):
    """Where a run's numbers go. In a run of several processes only process 0 has one."""

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Record the run's settings, once, before the first step."""

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Record numbers by name, such as ``train/loss``, as they are after `step` steps."""

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Record the run's results, once, after the last step."""

    def finish(self) -> None:
        """Bring everything to its place. Nothing may be recorded after; twice is once."""


class CompositeTracker:
    """Several trackers as one; with none of them it records nothing.

    Parameters
    ----------
    trackers : sequence of Tracker
        Each is called in turn.

    Examples
    --------
    >>> CompositeTracker([]).log({"train/loss": 3.2}, step=1)
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Hand the settings to each tracker."""
        for tracker in self.trackers:
            tracker.log_hyperparameters(hyperparameters)

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Hand the numbers to each tracker."""
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Hand the results to each tracker."""
        for tracker in self.trackers:
            tracker.log_summary(summary)

    def finish(self) -> None:
        """Finish every tracker, also after one of them failed.

        Raises
        ------
        ExceptionGroup
            Holding what the trackers raised.
        """
        errors = []
        for tracker in self.trackers:
            try:
                tracker.finish()
            except Exception as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("trackers failed to finish", errors)


def as_number(name: str, value: Scalar) -> int | float:
    """Turn a metric into a Python number.

    Parameters
    ----------
    name : str
        Name of the metric, for the message.
    value : scalar
        Number of Python, NumPy or JAX, or an array with one element.

    Returns
    -------
    int or float
        An int where `value` is a whole number by type.

    Raises
    ------
    ValueError
        When `value` is not a single real number.

    Examples
    --------
    >>> import numpy as np
    >>> as_number("train/loss", np.float32(0.5)), as_number("tokens", np.int64(3))
    (0.5, 3)
    """
    array = np.asarray(value)
    # bfloat16 and its like have kind "V": NumPy does not know them, float() does.
    if array.size != 1 or array.dtype.kind not in "biufV":
        raise ValueError(
            f"metric {name} is {type(value).__name__} of shape {array.shape} and dtype "
            f"{array.dtype}: must be a single real number; reduce or split it first"
        )
    number = array.reshape(()).item()
    return number if isinstance(number, int) else float(number)
