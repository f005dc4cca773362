"""Benchmark tjx attention against JAX and torch; print a table, write JSON and a figure.

    python tools/bench/attention.py [--torch-python PATH]

requires jax, numpy and tjx-kernels (or PYTHONPATH=packages/tjx-kernels/src), and matplotlib for the
figure. JAX and torch run in worker processes, which are measured alternately in each round. On a
GPU the time is the device time of the kernels from the profilers of JAX and torch; host-timed loops
are reported too.
"""

import argparse
import datetime
import json
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attention_cases import PASSES, Case, Suite, cases
from attention_picture import draw
from attention_report import cpu_goals, figures, gpu_goals, table
from attention_worker import Json, Worker, WorkerError
from gpu_slices import json_lines
from turns import gpu_state, machine

HERE = Path(__file__).resolve().parent
PATIENCE = {"cpu": 900.0, "gpu": 90.0}  # seconds without output after which a worker is killed
# Measuring time per entry, pass and round.
SECONDS = {"cpu": 0.5, "gpu": 0.03}


class Sides:
    """Worker processes of both frameworks, and the entries excluded after failures."""

    def __init__(self, suite: Suite, torch_python: Path | None) -> None:
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if suite == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu"}
        patience = PATIENCE[suite]
        self.workers = {
            "jax": Worker([sys.executable, str(HERE / "attention_jax.py")], environment, patience)
        }
        if torch_python is not None:
            command = [str(torch_python), str(HERE / "attention_torch.py"), suite]
            self.workers["torch"] = Worker(command, {}, patience)
        self.excluded: dict[str, str] = {}

    def describe(self, suite: Suite) -> Json:
        """Query versions; drop torch if it is unavailable."""
        found: Json = {"jax": self.workers["jax"].describe()}
        if suite == "gpu" and found["jax"]["backend"] == "cpu":
            raise SystemExit("--suite gpu: JAX finds no GPU; install jax[cuda13], or --suite cpu")
        if "torch" not in self.workers:
            print("torch is skipped: give --torch-python, an interpreter with torch")
            return found
        try:
            found["torch"] = self.workers["torch"].describe()
        except (WorkerError, OSError) as error:
            print(f"torch is skipped: {error}")
            del self.workers["torch"]
        return found

    def prepare(self, case: Case) -> list[Json]:
        """Prepare a case in all workers."""
        return [entry for name in self.workers for entry in self._prepare(name, case)]

    def _prepare(self, name: str, case: Case) -> list[Json]:
        while True:
            try:
                return self.workers[name].prepare(case, self.excluded)
            except WorkerError as death:
                self._exclude(case, death)
                if not death.entry:
                    return [{"name": name, "skipped": f"failed: {death}"}]

    def measure(self, case: Case, seconds: float, found: dict[str, Json]) -> None:
        """Measure one round of a case in each worker; append times to the entries in `found`."""
        for name, worker in self.workers.items():
            try:
                measured = worker.measure(seconds)
            except WorkerError as death:
                # Keep earlier rounds; the other entries of this worker can still be measured.
                self._exclude(case, death)
                if death.entry in found:
                    found[death.entry]["skipped"] = f"failed: {death}"
                    found[death.entry]["times"] = None
                self._prepare(name, case)
                continue
            for entry, passes in measured.items():
                if found[entry].get("times") is not None:
                    for which, times in passes.items():
                        found[entry]["times"][which].append(times)

    def _exclude(self, case: Case, death: WorkerError) -> None:
        print(f"{death.entry or 'a worker'} died at {case.name}: {death}", flush=True)
        if death.entry:
            self.excluded[death.entry] = f"failed at {case.name}: {death}"

    def stop(self) -> None:
        """Stop the workers."""
        for worker in self.workers.values():
            worker.stop()


def measure_case(sides: Sides, case: Case, *, rounds: int, seconds: float, until: float) -> Json:
    """Measure one case for up to `rounds` rounds until the time limit, but at least two."""
    print(f"{case.name} ...", end=" ", flush=True)
    start = time.monotonic()
    entries = sides.prepare(case)
    for entry in entries:
        if not entry["skipped"]:
            entry["times"] = {which: [] for which in PASSES}
    found = {entry["name"]: entry for entry in entries}
    prepared, done = time.monotonic(), 0
    while done < rounds and (done < 2 or time.monotonic() < until):
        sides.measure(case, seconds, found)
        done += 1
    end = time.monotonic()
    took = f"prepared in {prepared - start:.0f} s, {done} rounds in {end - prepared:.0f} s"
    print(took, flush=True)
    return {
        "case": asdict(case),
        "rounds": done,
        "load_average": os.getloadavg()[0],
        "gpu": gpu_state(),
        "entries": entries,
    }


def report(case: str, found: Json) -> None:
    """Print a case as a JSON line; its status is failed if any entry failed."""
    failed = [f"{k}: {v}" for k, v in found["left_out"].items() if v.startswith("failed")]
    json_lines.finish(
        case, "failed" if failed else "ok", **found, reason="; ".join(failed)[:500] or None
    )


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=("cpu", "gpu"), help="default: gpu if available")
    parser.add_argument("--torch-python", type=Path, help="Python interpreter with torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes, to test the command")
    parser.add_argument("--cases", default="", help="regular expression of case names to run")
    parser.add_argument("--json-lines", action="store_true", help="print each case as a JSON line")
    parser.add_argument("--minutes", type=float, help="time limit; default on a GPU: 7")
    parser.add_argument("--output", type=Path, help="output JSON; the figure gets its name")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error(f"--rounds: got {given.rounds}; expected at least 1")
    return given


def run(given: argparse.Namespace, suite: Suite) -> Json:
    """Measure the suite."""
    sides = Sides(suite, given.torch_python)
    minutes = given.minutes or (7.0 if suite == "gpu" else 1e9)
    end = time.monotonic() + 60 * minutes
    load = os.getloadavg()[0]
    if load > 0.1 * (os.cpu_count() or 1):
        print(f"other programs are running (load average {load:.1f}): times will be inaccurate")
    try:
        environment = machine() | sides.describe(suite)
        environment["device"] = environment["cpu"]
        if suite == "gpu":
            environment["device"] = environment["gpu"].get("name") or environment["jax"]["device"]
        chosen = [c for c in cases(suite, quick=given.quick) if re.search(given.cases, c.name)]
        seconds = SECONDS[suite] / (10 if given.quick else 1)
        rounds = min(given.rounds, 2) if given.quick else given.rounds
        records = []
        for i, case in enumerate(chosen):
            until = time.monotonic() + (end - time.monotonic()) / (len(chosen) - i)
            if given.json_lines:
                json_lines.begin(case.name)
            records.append(measure_case(sides, case, rounds=rounds, seconds=seconds, until=until))
            if given.json_lines:
                report(case.name, figures(records[-1]))
    finally:
        sides.stop()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "suite": suite,
        "quick": given.quick,
        "environment": environment,
        "cases": records,
    }


def main() -> None:
    """Parse the command line and run the benchmark."""
    given = arguments()
    suite: Suite = given.suite or ("gpu" if gpu_state() else "cpu")
    result: dict[str, Any] = run(given, suite)
    goals = (gpu_goals if suite == "gpu" else cpu_goals)(result["cases"])
    result["goals"] = [goal._asdict() | {"verdict": goal.verdict} for goal in goals]
    for record in result["cases"]:
        print(*table(record), sep="\n")
    print("\npeer/this: time of the best peer divided by the time of this entry.\n")
    print(*(goal.line() for goal in goals), sep="\n")
    device = re.sub(r"[^a-z0-9]+", "-", result["environment"]["device"].lower()).strip("-")
    default = HERE / "results" / f"attention-{device}-{result['date'][:10]}.json"
    output: Path = given.output or default
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    picture = output.with_suffix(".png")
    drawn = (
        f" and {picture}" if draw(result, picture) else "; no figure: matplotlib is not installed"
    )
    print(f"\nwrote {output}{drawn}")


if __name__ == "__main__":
    main()
