"""Worker processes for alternating measurements, so that background load affects all equally.

A worker answers each JSON line with a JSON line. It runs for the whole benchmark, so that it
compiles once.
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


# Vector and matrix instruction sets to report from /proc/cpuinfo.
FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")


class WorkerError(Exception):
    """A worker process exited before answering; its output contains the reason."""


class Worker:
    """Worker process that answers requests.

    Parameters
    ----------
    command
        Program and arguments.
    environment
        Environment variables in addition to those of this process.
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
        """Send a request and return the answer.

        Raises
        ------
        WorkerError
            If the process exits before answering.
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
        """Stop the process; return its exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        status = self._process.wait()
        self._process.stdout.close()
        return status


def serve(answers: Mapping[str, Callable[..., Json]]) -> None:
    """Answer requests from standard input until end of file; call it in the worker."""
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)  # output of libraries must not mix with the answers
        for line in sys.stdin:
            values = json.loads(line)
            out.write(json.dumps(answers[values.pop("do")](**values)) + "\n")


def summary(seconds: Sequence[float]) -> Json:
    """Return median, minimum and maximum of times, in milliseconds."""
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
    """Return the CPU, its features, load and pinned cores of this machine."""
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
        # CPU affinity of this process, inherited by its workers.
        "pinned_cpus": sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else None,
        "gpu": gpu_state(),
        "system": platform.platform(),
        "revision": revision.stdout.strip() or None,
        "load_average": os.getloadavg(),
    }


def gpu_state() -> dict[str, str]:
    """Query nvidia-smi for name, driver, clocks and temperature of GPU 0; {} without a GPU."""
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
