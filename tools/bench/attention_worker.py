"""Worker processes of the attention benchmark, driven by requests of one JSON line each.

A worker runs for the whole benchmark, so that it compiles once. The parent sends a request to one
worker at a time, so that the other is idle during a measurement.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from attention_cases import Case, Pass

Json = dict[str, Any]
Progress = Callable[[str], None]


class Framework(Protocol):
    """Interface of a worker; it calls `progress` with an entry's name before running its code."""

    def describe(self) -> Json:
        """Return versions and devices."""

    def prepare(self, case: Case, exclude: Mapping[str, str], progress: Progress) -> list[Json]:
        """Compile and warm up each entry; return memory and error, or the reason to skip it."""

    def measure(self, seconds: float, progress: Progress) -> dict[str, dict[Pass, Json]]:
        """Time each prepared entry; return the seconds per call, by clock."""

    def release(self) -> None:
        """Free the memory of the case."""


class WorkerError(Exception):
    """A worker process exited or timed out.

    Attributes
    ----------
    entry
        Entry that was running.
    """

    def __init__(self, entry: str, reason: str) -> None:
        super().__init__(reason)
        self.entry = entry


# --- in the worker --------------------------------------------------------------------------------


def serve(make: Callable[[], Framework]) -> None:
    """Answer requests from standard input until it ends."""
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # output of libraries must not mix with the answers

        def answer(message: Json) -> None:
            answers.write(json.dumps(message) + "\n")

        def progress(entry: str) -> None:
            answer({"progress": entry})

        framework = make()
        for line in sys.stdin:
            request = json.loads(line)
            result: Any = None
            match request["do"]:
                case "describe":
                    result = framework.describe()
                case "prepare":
                    case_ = Case(**request["case"])
                    result = framework.prepare(case_, request["exclude"], progress)
                case "measure":
                    result = framework.measure(request["seconds"], progress)
                case "release":
                    framework.release()
            answer({"result": result})


def first_line(error: BaseException) -> str:
    """Return type and first line of the message of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:200]}"


def timed(call: Callable[[], object], wait: Callable[[], None], count: int) -> Json:
    """Time `count` calls by the host clocks."""
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        call()
    wait()
    return {
        "host": (time.perf_counter() - wall) / count,
        "cpu": (time.process_time() - cpu) / count,
    }


# --- in the parent --------------------------------------------------------------------------------


class Worker:
    """Worker process, started at the first request and restarted after it exits."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], patience: float):
        self._command, self._environment = list(command), dict(environment)
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._log: Path | None = None

    def describe(self) -> Json:
        """See `Framework.describe`."""
        result: Json = self._ask({"do": "describe"})
        return result

    def prepare(self, case: Case, exclude: Mapping[str, str]) -> list[Json]:
        """See `Framework.prepare`."""
        request = {"do": "prepare", "case": asdict(case), "exclude": dict(exclude)}
        result: list[Json] = self._ask(request)
        return result

    def measure(self, seconds: float) -> dict[str, dict[Pass, Json]]:
        """See `Framework.measure`."""
        result: dict[str, dict[Pass, Json]] = self._ask({"do": "measure", "seconds": seconds})
        return result

    def release(self) -> None:
        """See `Framework.release`."""
        self._ask({"do": "release"})

    def stop(self) -> None:
        """Stop the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None
        if self._log is not None:
            self._log.unlink(missing_ok=True)
            self._log = None

    def _start(self) -> subprocess.Popen[bytes]:
        handle, name = tempfile.mkstemp(prefix="attention-worker-", suffix=".log")
        self._log, self._unread = Path(name), b""
        with os.fdopen(handle, "wb") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | self._environment,
                bufsize=0,
            )

    def _ask(self, request: Json) -> Any:
        if self._process is None:
            self._process = self._start()
        process, entry = self._process, ""
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise self._death(entry, "ended") from None
        while True:
            message = json.loads(self._line(process, entry))
            if "progress" not in message:
                return message["result"]
            entry = message["progress"]

    def _line(self, process: subprocess.Popen[bytes], entry: str) -> bytes:
        assert process.stdout is not None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([process.stdout], [], [], self._patience)
            if not ready:
                raise self._death(entry, f"gave no output for {self._patience:.0f} s")
            more = os.read(process.stdout.fileno(), 2**16)
            if not more:
                raise self._death(entry, f"ended with status {process.wait()}")
            self._unread += more
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _death(self, entry: str, reason: str) -> WorkerError:
        text = self._log.read_text(errors="replace") if self._log else ""
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        self.stop()
        return WorkerError(entry, f"the process {reason}: {last.strip()[:200]}")
