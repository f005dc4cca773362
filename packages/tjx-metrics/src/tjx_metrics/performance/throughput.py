"""How fast a run goes, and how long it still takes."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Throughput:
    """Measure tokens a second and the time left, with warm-up left out.

    Call `update` when a step's result is there (not when it was dispatched). The first
    `warmup_steps` updates, with compilation among them, count nowhere. What is not training
    (evaluation, saving) goes inside `paused`: it is left out of the rates but not of the time
    left, since it will come again.

    Parameters
    ----------
    max_steps : int
        Step at which the run ends.
    start_step : int
        Steps that were done before (a resumed run).
    warmup_steps : int
        Updates that are not measured, at least 1: the time before the first one is unknown.
    window : int
        Updates over which `tokens_per_sec` is taken.
    clock : callable
        Seconds, monotonic.

    Raises
    ------
    ValueError
        When `warmup_steps` or `window` is below 1.

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
                f"warmup_steps={warmup_steps}, window={window}: both must be at least 1"
            )
        self._steps_left = max_steps - start_step
        self._warmup_left = warmup_steps
        self._clock = clock
        self._paused = 0.0  # seconds spent in pauses since the warm-up ended
        self._steps = 0  # steps since the warm-up ended
        # After each step: (seconds of training, tokens), both since the warm-up ended.
        self._marks: deque[tuple[float, int]] = deque(maxlen=window + 1)
        self._began: float | None = None
        self._elapsed = 0.0  # seconds since the warm-up ended, pauses included

    def update(self, tokens: int) -> None:
        """Count one step that is done.

        Parameters
        ----------
        tokens : int
            Tokens that the step trained on, over all devices and processes.
        """
        now = self._clock()
        self._steps_left -= 1
        if self._warmup_left > 0:
            self._warmup_left -= 1
            if self._warmup_left == 0:
                self._began = now
                self._paused = 0.0
                self._marks.append((0.0, 0))
            return
        assert self._began is not None
        self._steps += 1
        self._elapsed = now - self._began
        self._marks.append((self._elapsed - self._paused, self._marks[-1][1] + int(tokens)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the ``with`` block out of the rates."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    @property
    def tokens_per_sec(self) -> float | None:
        """Rate over the last `window` steps; None while nothing is measured."""
        if len(self._marks) < 2:
            return None
        return self._rate(self._marks[0])

    @property
    def mean_tokens_per_sec(self) -> float | None:
        """Rate since the warm-up; None while nothing is measured."""
        if len(self._marks) < 2:
            return None
        return self._rate((0.0, 0))

    @property
    def steps_per_sec(self) -> float | None:
        """Steps a second over the last `window` of them; None while nothing is measured."""
        if len(self._marks) < 2:
            return None
        seconds = self._marks[-1][0] - self._marks[0][0]
        return (len(self._marks) - 1) / seconds if seconds > 0 else None

    @property
    def mean_steps_per_sec(self) -> float | None:
        """Steps a second since the warm-up; None while nothing is measured."""
        seconds = self._marks[-1][0] if self._marks else 0.0
        return self._steps / seconds if seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Time until the last step at the mean pace, pauses included; None while unknown."""
        if self._steps == 0:
            return None
        return max(self._steps_left, 0) * self._elapsed / self._steps

    def _rate(self, since: tuple[float, int]) -> float | None:
        seconds, tokens = (now - then for now, then in zip(self._marks[-1], since, strict=True))
        return tokens / seconds if seconds > 0 else None
