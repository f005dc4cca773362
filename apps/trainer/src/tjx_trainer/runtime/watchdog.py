"""Ends a run that hangs, with its stacks, and keeps a heartbeat for whoever watches from outside.

Nothing here imports JAX.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TextIO

from tjx_trainer.config.watchdog_config import WatchdogConfig
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.runtime.supervisor_client import send_exit_reason

HEARTBEAT_FILE = "heartbeat.json"

_WINDOW = 101  # gaps of a phase that its median is of
_FEWEST = 3  # gaps that must be known before a phase can hang
_REPORT_SECONDS = 10.0  # what writing the stacks may take: the disk may be what hangs


class _Beat(NamedTuple):
    """A sign of life: what the run has begun to do, and when on the clock of time awake."""

    phase: str
    step: int
    time: float


class Watchdog:
    """Ends the process when a run makes no progress; a context manager.

    The run says what it begins with `beat`. The time until the next beat, of whatever phase, is a
    gap of that phase. A gap hangs when it is longer than `min_seconds` and `factor` times the
    median of the phase's gaps before, weighted by their length. The first gap of a phase is not
    counted, as it compiles, and before three were counted none can hang: so give each kind of work
    a phase of its own.

    Time in which the whole process was stopped (SIGSTOP, a laptop asleep) counts for nothing.

    Parameters
    ----------
    run_path : Path
        The run directory, where ``heartbeat.json`` is kept and ``hang-STEP.txt`` written. Process
        k > 0 of several adds ``-process-k`` to these names.
    config : WatchdogConfig
        The limits.
    process : int
        Number of this process.
    leave : callable
        Ends the process at once with an exit code; `os._exit`.

    Examples
    --------
    >>> with Watchdog(run_path, config.watchdog) as watchdog:  # doctest: +SKIP
    ...     for step in range(steps):
    ...         watchdog.beat("train", step)
    ...         train_step()
    """

    def __init__(
        self,
        run_path: Path,
        config: WatchdogConfig,
        *,
        process: int = 0,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self._run_path, self._config, self._leave = run_path, config, leave
        self._suffix = f"-process-{process}" if process else ""
        self._lock = threading.Lock()
        self._last: _Beat | None = None
        self._gaps: dict[str, deque[float]] = {}
        # A tick that comes late was late because nothing of the process ran: the clock of time
        # awake goes on by what a tick may take, whatever the world's clock says.
        self._tick = min(1.0, config.min_seconds / 10)
        self._awake, self._ticked = 0.0, time.monotonic()
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep_heartbeat, name="tjx-heartbeat", daemon=True)
        ]
        if config.enabled:
            self._threads.append(
                threading.Thread(target=self._watch, name="tjx-watchdog", daemon=True)
            )

    def __enter__(self) -> "Watchdog":
        self._ticked = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(_REPORT_SECONDS)

    def beat(self, phase: str, step: int) -> None:
        """Say that the run lives, and what it begins now.

        It takes microseconds and never waits for a disk.

        Parameters
        ----------
        phase : str
            Kind of the work that begins, such as ``train``: what takes alike long has one name.
        step : int
            Steps that are done.
        """
        with self._lock:
            now = self._time_awake()
            if self._last is not None:
                if (gaps := self._gaps.get(self._last.phase)) is None:
                    self._gaps[self._last.phase] = deque(maxlen=_WINDOW)  # it was the first
                else:
                    gaps.append(now - self._last.time)
            self._last = _Beat(phase, step, now)

    def _time_awake(self) -> float:
        """Return seconds for which the process was not stopped."""
        return self._awake + min(time.monotonic() - self._ticked, 2 * self._tick)

    def _watch(self) -> None:
        while not self._closing.wait(self._tick):
            with self._lock:
                self._awake, self._ticked = self._time_awake(), time.monotonic()
                if (hang := self._find_hang()) is None:
                    continue
            self._end(*hang)
            return

    def _find_hang(self) -> tuple[_Beat, float, float] | None:
        """Return the last sign of life, how long ago it was and the limit, if that is exceeded."""
        if self._last is None:
            return None
        gap, gaps = self._awake - self._last.time, self._gaps.get(self._last.phase, ())
        if gap <= self._config.min_seconds or len(gaps) < _FEWEST:
            return None
        limit = max(self._config.min_seconds, self._config.factor * _median_of_time(gaps))
        return (self._last, gap, limit) if gap > limit else None

    def _end(self, last: _Beat, gap: float, limit: float) -> None:
        """Write all stacks and end the process."""
        head = (
            f"error: the run hangs: after step {last.step} it has been in phase {last.phase!r} for "
            f"{gap:.1f} s, and {limit:.1f} s is the limit (--watchdog.factor, "
            f"--watchdog.min_seconds); process {os.getpid()} on {socket.gethostname()} ends with "
            f"exit code {ExitCode.HANG:d}. What each thread was doing:\n"
        )

        path = self._run_path / f"hang-{last.step}{self._suffix}.txt"

        def keep() -> None:
            with path.open("w", encoding="utf-8") as file:
                _write_stacks(file, head)

        send_exit_reason(head)
        # The disk, or whoever reads our stderr, may be what hangs.
        reports = [
            threading.Thread(target=target, name="tjx-watchdog-report", daemon=True)
            for target in (lambda: _write_stacks(sys.stderr, head), keep)
        ]
        for report in reports:
            report.start()
        deadline = time.monotonic() + _REPORT_SECONDS
        for report in reports:
            report.join(max(deadline - time.monotonic(), 0))
        self._leave(ExitCode.HANG)

    def _keep_heartbeat(self) -> None:
        written: _Beat | None = None
        is_last = False
        pause = min(self._tick, self._config.heartbeat_seconds)  # until there is a first beat
        while not is_last:
            is_last = self._closing.wait(pause)
            if (last := self._last) is not None and last is not written:
                self._write_heartbeat(last)
                written, pause = last, self._config.heartbeat_seconds

    def _write_heartbeat(self, last: _Beat) -> None:
        stem, ending = HEARTBEAT_FILE.split(".")
        path = self._run_path / f"{stem}{self._suffix}.{ending}"
        content = {
            "step": last.step,
            "phase": last.phase,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError:  # on a full disk the heartbeat grows old, which is what it is for
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _median_of_time(gaps: Collection[float]) -> float:
    """Return the length of the gap that was going on in the median second.

    Where much is only started, gaps that take no time come between the real ones: they do not move
    it as they would move the median of all gaps.
    """
    half, so_far = sum(gaps) / 2, 0.0
    for gap in sorted(gaps, reverse=True):
        so_far += gap
        if so_far >= half:
            return gap
    return 0.0


def _write_stacks(file: TextIO, head: str) -> None:
    file.write(head)
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
