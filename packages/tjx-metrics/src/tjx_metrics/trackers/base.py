"""What a tracker is, and several as one."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, SupportsFloat, runtime_checkable

import numpy as np
from numpy.typing import NDArray

# Numbers of Python, NumPy and JAX alike. To read a JAX scalar waits for the device: fetch metrics
# a step late.
Scalar = SupportsFloat


class Histogram(NamedTuple):
    """How many values lie between each two edges.

    Attributes
    ----------
    counts : int64 array [bins]
        Values in each bin.
    edges : float64 array [bins + 1]
        Where bins begin, in order, and where the last one ends.
    """

    counts: NDArray[np.int64]
    edges: NDArray[np.float64]


@runtime_checkable
class Tracker(Protocol):
    """Where a run's numbers go. In a run of several processes only process 0 has one."""

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Record the run's settings, once, before the first step."""

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Record numbers by name, such as ``train/loss``, as they are after `step` steps."""

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Record histograms by name, such as ``histograms/parameter/wte/embedding``."""

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Record texts by name, such as ``samples/text``, as the model writes after `step`."""

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

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Hand the histograms to each tracker."""
        for tracker in self.trackers:
            tracker.log_histograms(histograms, step)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Hand the texts to each tracker."""
        for tracker in self.trackers:
            tracker.log_texts(texts, step)

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


def as_histogram(name: str, value: Histogram) -> Histogram:
    """Check a histogram, and bring it to the dtypes that `Histogram` tells.

    Parameters
    ----------
    name : str
        Name of the histogram, for the message.
    value : Histogram
        Of NumPy arrays, or of sequences of numbers.

    Returns
    -------
    Histogram
        Of NumPy arrays.

    Raises
    ------
    ValueError
        When there are no bins, edges are not one more than counts, or counts are not whole numbers.

    Examples
    --------
    >>> histogram = as_histogram("histograms/parameter/wte", Histogram(*np.histogram([1, 2, 5], 2)))
    >>> histogram.counts.tolist(), histogram.edges.tolist()
    ([2, 1], [1.0, 3.0, 5.0])
    """
    counts, edges = (np.asarray(part) for part in value)
    if counts.ndim != 1 or not counts.size or edges.shape != (counts.size + 1,):
        raise ValueError(
            f"histogram {name} has counts of shape {counts.shape} and edges of shape "
            f"{edges.shape}: must be [bins] and [bins + 1], with at least one bin"
        )
    if counts.dtype.kind not in "iu":
        raise ValueError(
            f"histogram {name} has counts of dtype {counts.dtype}: must be whole numbers, how many "
            "values lie in each bin"
        )
    return Histogram(counts.astype(np.int64), edges.astype(np.float64))
