"""A tracker that cannot hold up or stop a run: it works in a thread beside it."""

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tjx_metrics.errors import TrackerWarning
from tjx_metrics.trackers.base import Histogram, Scalar, Tracker, as_histogram, as_number

FINISH_SECONDS = 20.0  # to import wandb on a busy machine has taken 10
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before something is tried again
TRIES = 3  # of a record, before the next one is tried: is it the record, or the tracker?


@dataclass(eq=False)
class _Record:
    """One call of a tracker that is still to be made."""

    method: str
    arguments: tuple[Any, ...]
    failures: int = 0


class BackgroundTracker:
    """Hand records to a tracker in a thread of its own, which may fail, block or die.

    Recording costs the caller no more than a place in a queue. What fails, the making of the
    tracker too, is tried again after a pause that doubles each time, with a tracker made anew.
    Records wait meanwhile; beyond `max_kept` the oldest are lost. A record that the tracker refuses
    again and again, but not the one after it, is lost too. `TrackerWarning` says once that it
    fails, and at the end how many records were lost. The process's end waits for nothing.

    Parameters
    ----------
    make : callable
        Makes the tracker, in the thread; called again after a failure, it goes on with the same
        run. Its argument tells whether it is the first time.
    name : str
        What warnings call it.
    max_kept : int
        Records that wait at most.
    finish_seconds : float
        Seconds that `finish` waits at most.
    first_pause : float
        Seconds before what failed is tried again the first time.
    """

    def __init__(
        self,
        make: Callable[[bool], Tracker],
        name: str,
        *,
        max_kept: int = 10_000,
        finish_seconds: float = FINISH_SECONDS,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        self.name = name
        self._make = make
        self._max_kept = max_kept
        self._finish_seconds = finish_seconds
        self._first_pause = first_pause
        self._tracker: Tracker | None = None  # the thread's own, as is the next one
        self._made = False
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[_Record] = deque()
        self._lost = 0
        self._problem: str | None = None
        self._told = self._finishing = self._abandoned = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Record the run's settings."""
        self._put("log_hyperparameters", dict(hyperparameters))

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Record numbers; ValueError where one is no single number."""
        self._put("log", {name: as_number(name, value) for name, value in metrics.items()}, step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Record histograms; ValueError where one is none."""
        checked = {name: as_histogram(name, value) for name, value in histograms.items()}
        self._put("log_histograms", checked, step)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Record texts."""
        self._put("log_texts", dict(texts), step)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Record the run's results."""
        self._put("log_summary", dict(summary))

    def finish(self, timeout: float | None = None) -> None:
        """Wait until all is recorded, but not for long; warn of what is lost. Twice is once.

        Parameters
        ----------
        timeout : float or None
            Seconds to wait at most; None is `finish_seconds`.
        """
        with self._changed:
            if self._finishing:
                return
            self._finishing = True
            self._changed.notify_all()
        seconds = self._finish_seconds if timeout is None else timeout
        self._thread.join(seconds)
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
            unfinished, lost = self._thread.is_alive(), self._lost + len(self._waiting)
            problem = f" ({self._problem})" if self._problem else ""
            untold = problem and not self._told
        if lost:
            self._warn(f"{lost} records are lost{problem}; metrics.jsonl has them")
        elif unfinished:
            self._warn(
                f"has not ended after {seconds:g} seconds{problem}: it may lack the last records; "
                "metrics.jsonl has them"
            )
        elif untold:
            self._warn(f"has failed{problem}, and was made anew")

    def _put(self, method: str, *arguments: Any) -> None:
        with self._changed:
            if self._finishing:
                raise ValueError(f"the tracker {self.name} is finished: record before finish")
            self._waiting.append(_Record(method, arguments))
            if is_full := len(self._waiting) > self._max_kept:
                self._waiting.popleft()
                self._lost += 1
            self._changed.notify_all()
            problem = self._problem or ("takes no records" if is_full else None)
            tell, self._told = problem is not None and not self._told, self._told or bool(problem)
        if tell:  # in the caller's thread, where warnings are filtered and shown
            self._warn(f"{problem}; training goes on, and it is tried again")

    def _warn(self, text: str) -> None:
        warnings.warn(f"tracker {self.name}: {text}", TrackerWarning, stacklevel=4)

    def _work(self) -> None:
        """Deliver records until the end; what fails is tried again."""
        pause = self._first_pause
        while True:
            try:
                if not self._deliver_next():
                    return
                pause = self._first_pause
            except BaseException as error:  # a library may even exit
                self._fail(error)
                pause = self._rest(pause)

    def _rest(self, pause: float) -> float:
        """Wait before what failed is tried again; return how long to wait the next time."""
        end = time.monotonic() + pause
        with self._changed:
            finishing = self._finishing
            while not self._abandoned and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
                if self._finishing and not finishing:  # there is not much time left
                    return self._first_pause
        return min(2 * pause, LONGEST_PAUSE)

    def _deliver_next(self) -> bool:
        """Make the tracker, then wait for a record and deliver it; False after the last one."""
        if self._abandoned:
            return False
        if self._tracker is None:
            self._tracker = self._make(not self._made)
            self._made = True
        with self._changed:
            while not self._waiting and not self._finishing:
                self._changed.wait()
            record = None
            if self._waiting:
                record = self._waiting[0]
                if record.failures >= TRIES and len(self._waiting) > 1:
                    record = self._waiting[1]
        if record is None:
            self._tracker.finish()
            return False
        try:
            getattr(self._tracker, record.method)(*record.arguments)
        except BaseException:
            record.failures += 1
            raise
        with self._changed:
            self._delivered(record)
        return True

    def _delivered(self, record: _Record) -> None:
        if self._waiting and self._waiting[0] is record:
            self._waiting.popleft()
        elif len(self._waiting) > 1 and self._waiting[1] is record:
            self._waiting.popleft()  # it was refused again and again
            self._waiting.popleft()
            self._lost += 1
        else:
            self._lost -= 1  # it was given up for want of room, and has come through

    def _fail(self, error: BaseException) -> None:
        """Keep what to tell, and let go of a tracker that failed."""
        text = str(error).strip().splitlines()
        with self._changed:
            self._problem = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with suppress(BaseException):
                tracker.finish()
