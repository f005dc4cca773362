"""Time per phase of the training loop's thread. Does not import JAX."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = ("data_wait", "dispatch", "device", "evaluation", "checkpoint", "other")
"""The phases of a training run; the metric `time/PHASE` has the seconds of each."""


class PhaseTimer:
    """Divide the wall time of one thread into phases; each moment belongs to exactly one phase.

    Phases measure what the host waits for, not how long devices are busy. If the host mostly waits
    in "device", the devices are busy; if it mostly waits in another phase, they may be idle.

    data_wait
        Waiting for the next batch.
    dispatch
        Calling the jitted step: Python overhead and enqueueing work. Includes compilation, and
        waiting for room in a full device queue.
    device
        Waiting for the result of a step.
    evaluation, checkpoint
        All of an evaluation or a blocking save, including waits for devices and disks. Saving in
        background threads is not included.
    other
        Everything else: logging, plotting, checking for signals.

    Parameters
    ----------
    clock : callable
        Returns monotonic seconds.

    Examples
    --------
    >>> ticks = iter([0.0, 1.0, 1.5, 4.0, 5.0, 5.0])
    >>> timer = PhaseTimer(clock=lambda: next(ticks))
    >>> with timer.during("data_wait"):
    ...     pass
    >>> with timer.during("device"):
    ...     seconds = timer.take()
    >>> seconds["data_wait"], seconds["device"], seconds["other"]
    (0.5, 1.0, 3.5)
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._phase, self._since = "other", clock()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the time inside the ``with`` block to `phase` instead of the enclosing phase.

        Parameters
        ----------
        phase : str
            One of `PHASES`.

        Yields
        ------
        None
            The context.

        Raises
        ------
        ValueError
            If the phase is unknown.
        """
        _check(phase)
        enclosing = self._enter(phase)
        try:
            yield
        finally:
            self._enter(enclosing)

    def add(self, phase: str, seconds: float, *, out_of: str) -> None:
        """Move time that has passed from one phase to another.

        Use it for a wait that is measured inside another phase: the wait of
        ``step(batches.get())`` is counted to "dispatch" until it is moved to "data_wait".

        Parameters
        ----------
        phase : str
            Phase that receives the time.
        seconds : float
            Duration.
        out_of : str
            Phase that the time was counted to since the last `take`.

        Raises
        ------
        ValueError
            If a phase is unknown.
        """
        _check(phase)
        _check(out_of)
        self._enter(self._phase)
        self._seconds[phase] += seconds
        self._seconds[out_of] -= seconds

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, and reset them.

        Returns
        -------
        dict
            In the order of `PHASES`; the sum equals the time since the last call.
        """
        self._enter(self._phase)
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds

    def _enter(self, phase: str) -> str:
        """Count the elapsed time to the current phase, switch to `phase`, return the old one."""
        now, previous = self._clock(), self._phase
        self._seconds[previous] += now - self._since
        self._phase, self._since = phase, now
        return previous


def _check(phase: str) -> None:
    if phase not in PHASES:
        raise ValueError(f"phase: got {phase!r}; expected one of {', '.join(PHASES)}")
