"""The `Tracker` interface, its value types, and a tracker that forwards to several others."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, SupportsFloat, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Scalar = SupportsFloat
"""A Python, NumPy or JAX number. Reading a JAX scalar waits for the device: log one step late."""


class Histogram(NamedTuple):
    """Counts of values between bin edges.

    Attributes
    ----------
    counts : int64 array [bins]
        Number of values in each bin.
    edges : float64 array [bins + 1]
        Bin edges in ascending order.
    """

    counts: NDArray[np.int64]
    edges: NDArray[np.float64]


@runtime_checkable
class Tracker(Protocol):
    """Receives the records of a run. With several processes, only process 0 has trackers."""

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Record the run's hyperparameters, once, before the first step.

        Parameters
        ----------
        hyperparameters : mapping
            Values by dotted name.
        """

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Record named metrics, such as ``train/loss``, after `step` steps.

        Parameters
        ----------
        metrics : mapping of str to number
            Numbers by name.
        step : int
            Number of finished steps.
        """

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Record named histograms, such as ``histograms/parameter/wte/embedding``.

        Parameters
        ----------
        histograms : mapping of str to Histogram
            Counts and bin edges by name.
        step : int
            Number of finished steps.
        """

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Record named texts, such as ``samples/text``.

        Parameters
        ----------
        texts : mapping of str to str
            Texts by name.
        step : int
            Number of finished steps.
        """

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Record the final results, once, after the last step.

        Parameters
        ----------
        summary : mapping
            Results by name.
        """

    def finish(self) -> None:
        """Write everything and close the tracker. Idempotent; logging afterwards is an error."""


class CompositeTracker:
    """Forward every record to several trackers.

    Parameters
    ----------
    trackers : sequence of Tracker
        Called in order; may be empty.

    Examples
    --------
    >>> CompositeTracker([]).log({"train/loss": 3.2}, step=1)
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Forward the hyperparameters to each tracker."""
        for tracker in self.trackers:
            tracker.log_hyperparameters(hyperparameters)

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Forward the metrics to each tracker."""
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Forward the histograms to each tracker."""
        for tracker in self.trackers:
            tracker.log_histograms(histograms, step)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Forward the texts to each tracker."""
        for tracker in self.trackers:
            tracker.log_texts(texts, step)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Forward the summary to each tracker."""
        for tracker in self.trackers:
            tracker.log_summary(summary)

    def finish(self) -> None:
        """Finish every tracker, even if one of them fails.

        Raises
        ------
        ExceptionGroup
            The errors of the trackers.
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
    """Convert a metric to a Python number.

    Parameters
    ----------
    name : str
        Name of the metric, for the error message.
    value : scalar
        Python, NumPy or JAX number, or an array with one element.

    Returns
    -------
    int or float
        An int if `value` has an integer dtype.

    Raises
    ------
    ValueError
        If `value` is not a single real number.

    Examples
    --------
    >>> import numpy as np
    >>> as_number("train/loss", np.float32(0.5)), as_number("tokens", np.int64(3))
    (0.5, 3)
    """
    array = np.asarray(value)
    # bfloat16 and other extension dtypes have kind "V"; float() converts them.
    if array.size != 1 or array.dtype.kind not in "biufV":
        raise ValueError(
            f"metric {name}: got {type(value).__name__} of shape {array.shape} and dtype "
            f"{array.dtype}; expected a single real number; reduce or split it first"
        )
    number = array.reshape(()).item()
    return number if isinstance(number, int) else float(number)


def as_numbers(metrics: Mapping[str, Scalar]) -> dict[str, int | float]:
    """Convert metrics to Python numbers, each by `as_number`."""
    return {name: as_number(name, value) for name, value in metrics.items()}


def as_histograms(histograms: Mapping[str, Histogram]) -> dict[str, Histogram]:
    """Validate histograms and convert them to int64 counts and float64 edges.

    Parameters
    ----------
    histograms : mapping from str to Histogram
        Of NumPy arrays or sequences of numbers.

    Returns
    -------
    dict
        The histograms as NumPy arrays.

    Raises
    ------
    ValueError
        If a histogram has no bins, a wrong number of edges, or counts that are not integers.

    Examples
    --------
    >>> histogram = as_histograms({"wte": Histogram(*np.histogram([1, 2, 5], 2))})["wte"]
    >>> histogram.counts.tolist(), histogram.edges.tolist()
    ([2, 1], [1.0, 3.0, 5.0])
    """
    return {name: _as_histogram(name, value) for name, value in histograms.items()}


def _as_histogram(name: str, value: Histogram) -> Histogram:
    counts, edges = (np.asarray(part) for part in value)
    if counts.ndim != 1 or not counts.size or edges.shape != (counts.size + 1,):
        raise ValueError(
            f"histogram {name}: got counts of shape {counts.shape} and edges of shape "
            f"{edges.shape}; expected [bins] and [bins + 1], with at least one bin"
        )
    if counts.dtype.kind not in "iu":
        raise ValueError(
            f"histogram {name}: got counts of dtype {counts.dtype}; expected integers, the number "
            "of values in each bin"
        )
    return Histogram(counts.astype(np.int64), edges.astype(np.float64))
