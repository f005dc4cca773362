"""Tokens per second and remaining time of a training run."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Throughput:
    """Measure tokens per second and remaining time, excluding warm-up.

    Call `update` when the result of a step is available, not when the step is dispatched. The first
    `warmup_steps` updates, which include compilation, are not measured. Wrap evaluation and saving
    in `paused`: they are excluded from the rates but included in the remaining time.

    Parameters
    ----------
    max_steps : int
        Last step of the run.
    start_step : int
        Step from which the run resumed.
    warmup_steps : int
        Updates that are not measured, at least 1.
    window : int
        Number of updates that `tokens_per_sec` averages over.
    clock : callable
        Returns monotonic seconds.

    Raises
    ------
    ValueError
        If `warmup_steps` or `window` is below 1.

    Examples
    --------
    >>> seconds = iter(range(100))
    >>> throughput = Throughput(max_steps=10, warmup_steps=1, clock=lambda: next(seconds))
    >>> for _ in range(4):
    ...     throughput.update(tokens=512)
    >>> throughput.tokens_per_sec, throughput.seconds_left
    (512.0, 6.0)
    """

    def __init__(
        self,
        *,
        max_steps: int,
        start_step: int = 0,
        warmup_steps: int = 2,
        window: int = 50,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if warmup_steps < 1 or window < 1:
            raise ValueError(
                f"warmup_steps, window: got {warmup_steps}, {window}; expected at least 1 of each"
            )
        self._steps_left = max_steps - start_step
        self._warmup_left = warmup_steps
        self._clock = clock
        # All of the following count from the end of the warm-up.
        self._paused = 0.0  # seconds
        self._steps = 0
        # After each step in the window: (seconds excluding pauses, tokens).
        self._marks: deque[tuple[float, int]] = deque(maxlen=window + 1)
        self._warmup_end: float | None = None
        self._elapsed = 0.0  # seconds including pauses

    def update(self, tokens: int) -> None:
        """Count one finished step.

        Parameters
        ----------
        tokens : int
            Tokens of the step, over all devices and processes.
        """
        now = self._clock()
        self._steps_left -= 1
        if self._warmup_left > 0:
            self._warmup_left -= 1
            if self._warmup_left == 0:
                self._warmup_end = now
                self._paused = 0.0
                self._marks.append((0.0, 0))
            return
        assert self._warmup_end is not None
        self._steps += 1
        self._elapsed = now - self._warmup_end
        self._marks.append((self._elapsed - self._paused, self._marks[-1][1] + int(tokens)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the ``with`` block from the rates."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    @property
    def tokens_per_sec(self) -> float | None:
        """Tokens per second over the last `window` steps; None before the first measurement."""
        return self._rate(self._marks[0]) if len(self._marks) > 1 else None

    @property
    def mean_tokens_per_sec(self) -> float | None:
        """Tokens per second since the warm-up; None before the first measurement."""
        return self._rate((0.0, 0)) if len(self._marks) > 1 else None

    @property
    def steps_per_sec(self) -> float | None:
        """Steps per second over the last `window` steps; None before the first measurement."""
        if len(self._marks) < 2:
            return None
        seconds = self._marks[-1][0] - self._marks[0][0]
        return (len(self._marks) - 1) / seconds if seconds > 0 else None

    @property
    def mean_steps_per_sec(self) -> float | None:
        """Steps per second since the warm-up; None before the first measurement."""
        seconds = self._marks[-1][0] if self._marks else 0.0
        return self._steps / seconds if seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Remaining seconds at the mean pace including pauses; None before a measurement."""
        if self._steps == 0:
            return None
        return max(self._steps_left, 0) * self._elapsed / self._steps

    def _rate(self, since: tuple[float, int]) -> float | None:
        seconds, tokens = (now - then for now, then in zip(self._marks[-1], since, strict=True))
        return tokens / seconds if seconds > 0 else None
