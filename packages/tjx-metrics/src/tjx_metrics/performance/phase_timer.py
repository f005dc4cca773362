"""What the time of a run is spent on, as the thread of its loop sees it. No JAX."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = ("data_wait", "dispatch", "device", "evaluation", "checkpoint", "other")


class PhaseTimer:
    """Divide the time of one thread into phases; every moment belongs to exactly one.

    Devices work while the host does something else, so these are not times of the devices: they say
    what the host waited for. A run whose host waits mostly for "device" has busy devices. One that
    waits for data, or spends its time in any other phase, may not.

    data_wait
        Waiting for the next batch, which other threads load meanwhile.
    dispatch
        Calling the jitted step: Python, and putting work into the queues of the devices. A call
        that compiles takes as long as that does, and one that finds the queues full waits here.
    device
        Waiting for the result of a step.
    evaluation, checkpoint
        The whole of it, waiting for devices and disks included. What a save does on other threads
        is not in it.
    other
        Everything else: logging, drawing, looking for signals.

    Parameters
    ----------
    clock : callable
        Seconds, monotonic.

    Examples
    --------
    >>> ticks = iter([0.0, 1.0, 1.5, 4.0, 5.0, 5.0])
    >>> clock = StepClock(clock=lambda: next(ticks))
    >>> with clock.during("data_wait"):
    ...     pass
    >>> with clock.during("device"):
    ...     spent = clock.take()
    >>> spent["data_wait"], spent["device"], spent["other"]
    (0.5, 1.0, 3.5)
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._phase, self._since = "other", clock()
        self._spent = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the time inside the ``with`` block to a phase, and not to one around it.

        Raises
        ------
        ValueError
            If there is no such phase.
        """
        _check(phase)
        around = self._enter(phase)
        try:
            yield
        finally:
            self._enter(around)

    def add(self, phase: str, seconds: float, *, out_of: str) -> None:
        """Count time that has passed to a phase, and no longer to the one that it was counted to.

        For a wait that only whoever waited could measure: that of ``step(batches.get())`` is in
        "dispatch" until it is moved to "data_wait".

        Parameters
        ----------
        phase : str
            Where the time belongs.
        seconds : float
            How long it was.
        out_of : str
            Where it was counted, since the last `take`.

        Raises
        ------
        ValueError
            If there is no such phase.
        """
        _check(phase)
        _check(out_of)
        self._enter(self._phase)
        self._spent[phase] += seconds
        self._spent[out_of] -= seconds

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, and begin anew.

        Returns
        -------
        dict
            By phase, in the order of `PHASES`; the sum is the time since the last call.
        """
        self._enter(self._phase)
        spent, self._spent = self._spent, dict.fromkeys(PHASES, 0.0)
        return spent

    def _enter(self, phase: str) -> str:
        """Count the time up to now to the phase that was; return it."""
        now, before = self._clock(), self._phase
        self._spent[before] += now - self._since
        self._phase, self._since = phase, now
        return before


def _check(phase: str) -> None:
    if phase not in PHASES:
        raise ValueError(f"phase {phase!r}: must be one of {', '.join(PHASES)}")
