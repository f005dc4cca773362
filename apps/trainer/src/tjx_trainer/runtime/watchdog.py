"""Watchdog: ends a hung run with a stack dump, and writes a heartbeat file. Imports no JAX."""

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

_WINDOW = 101  # intervals per phase in the running median
_FEWEST = 3  # intervals of a phase before a hang can be detected
_REPORT_SECONDS = 10.0  # limit for writing the stacks: the disk itself may hang


class _Beat(NamedTuple):
    """The start of a phase: name, step, and time on the clock that excludes suspension."""

    phase: str
    step: int
    time: float


class Watchdog:
    """End the process when a run makes no progress; a context manager.

    The run calls `beat` at the start of each phase. The interval until the next beat is a sample of
    that phase. A hang is an interval longer than `min_seconds` and `factor` times the median of the
    phase's earlier intervals, weighted by their length. The first interval of a phase is ignored
    because it includes compilation, and a hang is detected only after three more: give each kind of
    work its own phase.

    Time in which the whole process was suspended (SIGSTOP, a sleeping laptop) is not counted.

    Parameters
    ----------
    run_path : Path
        The run directory, for ``heartbeat.json`` and ``hang-STEP.txt``. Process k > 0 adds
        ``-process-k`` to the names.
    config : WatchdogConfig
        The limits.
    process : int
        Index of this process.
    leave : callable
        Ends the process with an exit code; `os._exit`.

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
        # A late tick means that the process was suspended: the clock advances by at most two ticks.
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
        """Record the start of a phase. Takes microseconds and never waits for a disk.

        Parameters
        ----------
        phase : str
            Name of the phase, such as ``train``; work of one phase takes similar times.
        step : int
            Completed steps.
        """
        with self._lock:
            now = self._time_awake()
            if self._last is not None:
                if (gaps := self._gaps.get(self._last.phase)) is None:
                    self._gaps[self._last.phase] = deque(maxlen=_WINDOW)  # ignore the first
                else:
                    gaps.append(now - self._last.time)
            self._last = _Beat(phase, step, now)

    def _time_awake(self) -> float:
        """Return the seconds in which the process was not suspended."""
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
        """Return the last beat, its age and the limit [s] if the age exceeds the limit."""
        if self._last is None:
            return None
        gap, gaps = self._awake - self._last.time, self._gaps.get(self._last.phase, ())
        if gap <= self._config.min_seconds or len(gaps) < _FEWEST:
            return None
        limit = max(self._config.min_seconds, self._config.factor * _weighted_median(gaps))
        return (self._last, gap, limit) if gap > limit else None

    def _end(self, last: _Beat, gap: float, limit: float) -> None:
        """Dump the stacks of all threads and end the process."""
        head = (
            f"error: the run hangs: after step {last.step} it has been in phase {last.phase!r} for "
            f"{gap:.1f} s; the limit is {limit:.1f} s (--watchdog.factor, "
            f"--watchdog.min_seconds); process {os.getpid()} on {socket.gethostname()} ends with "
            f"exit code {ExitCode.HANG:d}. Stacks of all threads:\n"
        )

        path = self._run_path / f"hang-{last.step}{self._suffix}.txt"

        def keep() -> None:
            with path.open("w", encoding="utf-8") as file:
                _write_stacks(file, head)

        send_exit_reason(head)
        # Write in threads: the disk or the reader of stderr may hang too.
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
        except OSError:  # a stale heartbeat is the intended signal
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _weighted_median(gaps: Collection[float]) -> float:
    """Return the median interval weighted by length.

    Asynchronous dispatch produces intervals of almost no time between the real ones. They would
    shift the unweighted median, but not this one.
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
