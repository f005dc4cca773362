"""Run a tracker in a background thread, so that it can neither block nor stop training."""

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tjx_metrics.errors import TrackerWarning
from tjx_metrics.trackers.base import Histogram, Scalar, Tracker, as_histograms, as_numbers

FINISH_SECONDS = 20.0  # importing wandb on a busy machine has taken 10 s
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between retries
TRIES = 3  # per record, before the next record shows whether the record or the tracker is at fault


@dataclass(eq=False)
class _Record:
    """A pending call of a tracker method."""

    method: str
    arguments: tuple[Any, ...]
    failures: int = 0


class BackgroundTracker:
    """Queue records for a tracker that runs in its own thread and may fail, block or die.

    Logging only appends to a queue. After a failure, including one of `make`, the tracker is
    recreated and the record retried, with exponential backoff. Up to `max_kept` records wait;
    beyond that, the oldest are dropped. A record that fails repeatedly while the next one succeeds
    is dropped too. `TrackerWarning` is issued once on failure, and at the end if records were lost.
    The thread is a daemon and does not block the exit of the process.

    Parameters
    ----------
    make : callable
        Creates the tracker in the thread. Called again after a failure; the new tracker must
        continue the same run. Its argument is True for the first call.
    name : str
        Name of the tracker in warnings.
    max_kept : int
        Maximum number of waiting records.
    finish_seconds : float
        Maximum time that `finish` blocks.
    first_pause : float
        Seconds before the first retry.
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
        self._tracker: Tracker | None = None  # used by the thread only, as is `_is_made`
        self._is_made = False
        self._changed = threading.Condition()  # guards the following attributes
        self._waiting: deque[_Record] = deque()
        self._lost = 0
        self._problem: str | None = None
        self._warned = self._finishing = self._abandoned = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Queue the hyperparameters."""
        self._put("log_hyperparameters", dict(hyperparameters))

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Queue metrics; raises ValueError if one is not a single number."""
        self._put("log", as_numbers(metrics), step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Queue histograms; raises ValueError if one is invalid."""
        self._put("log_histograms", as_histograms(histograms), step)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Queue texts."""
        self._put("log_texts", dict(texts), step)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Queue the summary."""
        self._put("log_summary", dict(summary))

    def finish(self, timeout: float | None = None) -> None:
        """Block until all records are written or the timeout expires; warn about lost records.

        Idempotent.

        Parameters
        ----------
        timeout : float or None
            Maximum seconds to block; None is `finish_seconds`.
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
            unreported = problem and not self._warned
        if lost:
            self._warn(f"{lost} records are lost{problem}; metrics.jsonl has them")
        elif unfinished:
            self._warn(
                f"not finished after {seconds:g} seconds{problem}: the last records may be "
                "missing; metrics.jsonl has them"
            )
        elif unreported:
            self._warn(f"failed{problem} and was restarted")

    def _put(self, method: str, *arguments: Any) -> None:
        with self._changed:
            if self._finishing:
                raise ValueError(f"the tracker {self.name} is finished: record before finish")
            self._waiting.append(_Record(method, arguments))
            if is_full := len(self._waiting) > self._max_kept:
                self._waiting.popleft()
                self._lost += 1
            self._changed.notify_all()
            problem = self._problem or ("accepts no records" if is_full else None)
            warn = problem is not None and not self._warned
            self._warned = self._warned or bool(problem)
        if warn:  # in the caller's thread, so that its warning filters apply
            self._warn(f"{problem}; training continues and the tracker is retried")

    def _warn(self, text: str) -> None:
        warnings.warn(f"tracker {self.name}: {text}", TrackerWarning, stacklevel=4)

    def _work(self) -> None:
        """Deliver records until the tracker is finished, retrying after failures."""
        pause = self._first_pause
        while True:
            try:
                if not self._deliver_next():
                    return
                pause = self._first_pause
            except BaseException as error:  # a library may even call sys.exit
                self._handle_failure(error)
                pause = self._back_off(pause)

    def _back_off(self, pause: float) -> float:
        """Wait before a retry; return the pause before the next retry."""
        end = time.monotonic() + pause
        with self._changed:
            finishing = self._finishing
            while not self._abandoned and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
                if self._finishing and not finishing:  # `finish` waits: retry at once
                    return self._first_pause
        return min(2 * pause, LONGEST_PAUSE)

    def _deliver_next(self) -> bool:
        """Create the tracker if needed, wait for a record and deliver it; False after the last."""
        if self._abandoned:
            return False
        if self._tracker is None:
            self._tracker = self._make(not self._is_made)
            self._is_made = True
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
            self._remove_delivered(record)
        return True

    def _remove_delivered(self, record: _Record) -> None:
        if self._waiting and self._waiting[0] is record:
            self._waiting.popleft()
        elif len(self._waiting) > 1 and self._waiting[1] is record:
            self._waiting.popleft()  # failed repeatedly although the tracker works
            self._waiting.popleft()
            self._lost += 1
        else:
            self._lost -= 1  # dropped from the full queue while it was being delivered

    def _handle_failure(self, error: BaseException) -> None:
        """Store the error for the warning and discard the failed tracker."""
        text = str(error).strip().splitlines()
        with self._changed:
            self._problem = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with suppress(BaseException):
                tracker.finish()
