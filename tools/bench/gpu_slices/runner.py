"""Run the processes of a slice within its time limit, and record each case.

Every process has its own time limit and log. If a process crashes, hangs or times out, its current
case is recorded as failed; the other processes continue.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gpu_slices.json_lines import Json, read

SHORTEST = 3.0  # seconds; a process is not started with less time left
SCALARS = (str, int, float, bool)

_running: set[int] = set()  # process groups


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes
    ----------
    name
        Name of the process, its log and its cases.
    command
        Program and arguments; runs in the root of the repository.
    seconds
        Time limit of the process.
    environment
        Variables in addition to the environment of this process.
    skip
        Reason for not running the process; reported as a skipped case.
    reports
        Whether the process prints `gpu_slices.json_lines`; otherwise the process is one case, which
        succeeds if the exit status is 0.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    skip: str | None = None
    reports: bool = True


@dataclass(frozen=True)
class Stage:
    """Processes that run one after another, or at the same time.

    Attributes
    ----------
    name
        Name of the stage.
    steps
        Most important first, as the last steps are not started if time runs out.
    seconds
        Time limit of the stage.
    parallel
        Number of parallel processes; 1 for stages that measure time.
    """

    name: str
    steps: Sequence[Step]
    seconds: float
    parallel: int = 1


class Recorder:
    """Write each case to a file of JSON lines when it ends, and print a short form.

    Parameters
    ----------
    file
        Output file; overwritten.
    """

    def __init__(self, file: Path) -> None:
        self._file = file.open("w")
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self.cases: list[Json] = []

    def add(self, step: str, content: Json) -> None:
        """Record the end of a case."""
        at = round(time.monotonic() - self._start, 1)
        line = {"step": step, "at_seconds": at, **content}
        with self._lock:
            self.cases.append(line)
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        print(
            f"{at:6.1f} s  {line['status']:<8} {step}: {line['case']} {brief(content)}", flush=True
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def brief(content: Json) -> str:
    """Return the scalar figures of a case in at most 160 characters."""
    figures = [
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in content.items()
        if name not in ("case", "status") and isinstance(value, SCALARS)
    ]
    return ", ".join(figures)[:160]


def run_stage(stage: Stage, *, root: Path, logs: Path, recorder: Recorder, deadline: float) -> None:
    """Run the steps of a stage.

    Parameters
    ----------
    stage : Stage
        Stage to run.
    root : Path
        Working directory of the processes.
    logs : Path
        Folder for the output of each process.
    recorder : Recorder
        Receives each completed case.
    deadline : float
        Time by `time.monotonic` at which the slice ends.
    """
    print(f"== {stage.name}", flush=True)
    end = min(deadline, time.monotonic() + stage.seconds)
    with ThreadPoolExecutor(max_workers=stage.parallel) as pool:
        futures = [
            pool.submit(_Process(step, recorder).run, root=root, logs=logs, end=end)
            for step in stage.steps
        ]
    for future in futures:
        future.result()


class _Process:
    """Process of a step."""

    def __init__(self, step: Step, recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._running: str | None = None  # the case that began and has not ended
        self._ended = self._failed = 0
        self._last = ""  # last line of output that is not JSON

    def run(self, *, root: Path, logs: Path, end: float) -> None:
        """Run the process to its end or its limit."""
        step = self._step
        if step.skip is not None:
            self._add({"case": step.name, "status": "skipped", "reason": step.skip})
            return
        seconds = min(step.seconds, end - time.monotonic())
        if seconds < SHORTEST:
            reason = "not started: no time left"
            self._add({"case": step.name, "status": "failed", "reason": reason})
            return
        begin = time.monotonic()
        with (logs / f"{step.name}.log").open("w") as log:
            process = subprocess.Popen(
                step.command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=root,
                env={**os.environ, **step.environment},
                process_group=0,  # so that its children can be killed with it
                text=True,
                errors="replace",
            )
            _running.add(process.pid)
            assert process.stdout is not None
            reader = threading.Thread(target=self._read, args=(process.stdout, log), daemon=True)
            reader.start()
            try:
                status = process.wait(timeout=seconds)
                reason = f"the process ended with status {status}" if status else ""
            except subprocess.TimeoutExpired:
                reason = f"exceeded its limit of {seconds:.0f} s"
            _kill_group(process.pid)  # includes remaining children
            process.wait()
            _running.discard(process.pid)
            reader.join(timeout=5.0)
        self._conclude(reason, time.monotonic() - begin)

    def _read(self, output: IO[str], log: IO[str]) -> None:
        with output:
            for line in output:
                if not line.strip():
                    continue
                content = read(line)
                if content is None:
                    self._last = line.strip()
                    log.write(line)
                    log.flush()
                elif "begin" in content:
                    self._running = content["begin"]
                    log.write(f"-- {self._running}\n")
                else:
                    self._running = None
                    if content["status"] == "failed" and self._last:
                        content["output"] = self._last[-300:]
                    self._add(content)

    def _conclude(self, reason: str, seconds: float) -> None:
        name, took = self._step.name, round(seconds, 1)
        if reason and self._last:
            reason += f": {self._last[-300:]}"
        if not reason and self._running is not None:
            reason = "the process ended before the case did"
        if reason and (self._running is not None or not self._failed):
            case = self._running or name
            self._add({"case": case, "status": "failed", "reason": reason, "seconds": took})
        elif not reason and not self._step.reports:
            self._add({"case": name, "status": "ok", "seconds": took})
        elif not self._ended:
            reason = "the process reported no case"
            self._add({"case": name, "status": "failed", "reason": reason, "seconds": took})

    def _add(self, content: Json) -> None:
        self._ended += 1
        self._failed += content["status"] == "failed"
        self._recorder.add(self._step.name, content)


def stop_all() -> None:
    """Kill all running processes; for use in a signal handler."""
    for group in list(_running):
        _kill_group(group)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def failures(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each case that failed."""
    return [
        f"{case['step']}: {case['case']}: {case.get('reason', '')}"
        for case in cases
        if case["status"] == "failed"
    ]
