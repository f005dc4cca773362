"""Two programs measured in turn, so that what else the machine does falls on both alike.

A worker is a process that answers one JSON line with one JSON line, and lives for the whole run, so
that it compiles once.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]


# Vector and matrix instructions, of those that /proc/cpuinfo names.
FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")


class WorkerError(Exception):
    """A worker ended before it answered; what it printed says why."""


class Worker:
    """A process that is asked questions.

    Parameters
    ----------
    command
        What to start.
    environment
        Variables beside this process' own.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, question: str, **values: Any) -> Json:
        """Return the answer to a question.

        Raises
        ------
        WorkerError
            If the process ended instead.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": question, **values}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"a worker ended with {self.stop()} at {question!r}")
        answer: Json = json.loads(line)
        return answer

    def stop(self) -> int:
        """End the process; return its status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        status = self._process.wait()
        self._process.stdout.close()
        return status


def serve(answers: Mapping[str, Callable[..., Json]]) -> None:
    """Answer questions from standard input until it ends; called in the worker."""
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)  # what libraries print must not get between the answers
        for line in sys.stdin:
            values = json.loads(line)
            out.write(json.dumps(answers[values.pop("do")](**values)) + "\n")


def summary(seconds: Sequence[float]) -> Json:
    """Return median, least and most of some times, in milliseconds."""
    ms = [1000 * each for each in seconds]
    return {
        "median_ms": round(statistics.median(ms), 3),
        "least_ms": round(min(ms), 3),
        "most_ms": round(max(ms), 3),
        "count": len(ms),
    }


def percentiles(seconds: Sequence[float]) -> Json:
    """Return percentiles of at least two times, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    found: Json = {f"p{p}_ms": round(1000 * cuts[p - 1], 3) for p in (10, 50, 90, 99)}
    return {**found, "max_ms": round(1000 * max(seconds), 3), "steps": len(seconds)}


def machine() -> Json:
    """Say what the benchmark runs on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    if model := re.search(r"model name\s*: (.*)", text):
        cpu = model[1]
    flags = re.search(r"(?:flags|Features)\s*: (.*)", text)
    available = set(flags[1].split()) if flags else set()
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return {
        "cpu": cpu,
        "cpu_features": [name for name in FEATURES if name in available],
        "cpus": os.cpu_count(),
        # The CPUs that this process and its workers may run on.
        "pinned_cpus": sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else None,
        "gpu": gpu_state(),
        "system": platform.platform(),
        "revision": revision.stdout.strip() or None,
        "load_average": os.getloadavg(),
    }


def gpu_state() -> dict[str, str]:
    """Ask nvidia-smi for the first GPU's name, driver, clocks and temperature; {} without one."""
    fields = (
        "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw",
        "power.limit", "temperature.gpu", "memory.total",
    )  # fmt: skip
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = answer.stdout.strip().split(", ")
    return dict(zip(fields, values, strict=False)) if answer.returncode == 0 else {}
