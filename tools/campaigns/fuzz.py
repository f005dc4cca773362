"""Fuzzing campaign: each corrupted input must give a documented error or a correct result.

    ./pants run tools/campaigns/fuzz.py -- --seed 0 --cases 10000 [--output FOLDER]

or with Python only, with the packages and `tools` on PYTHONPATH. Presets, command lines, prepared
sets, corpus files, tokenizers, model folders and checkpoints are mutated with knowledge of their
structure and read in processes with limited memory. A case fails if an error is raised that is not
documented or does not name the file; if the process dies, hangs, or uses more than 1 GB; or if an
accepted result differs from the files.

A failure is minimized, reported with the command that repeats it, and its files are kept in the
output folder:

    ./pants run tools/campaigns/fuzz.py -- --seed 0 --kind tokenizer --only 1234
"""

import argparse
import collections
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from campaigns.fuzz_kinds import KINDS
from campaigns.fuzz_worker import HANGING_SECONDS, MOST_STEPS

Json = dict[str, Any]

WORKER = Path(__file__).with_name("fuzz_worker.py")
CHUNK = 250  # cases that a worker reads before it is replaced


class Worker:
    """Process that reads cases of one kind; a context manager.

    Parameters
    ----------
    kind, seed
        Of the cases.
    scratch
        Empty working folder.
    """

    def __init__(self, kind: str, seed: int, scratch: Path) -> None:
        self.kind, self.seed, self.scratch = kind, seed, scratch
        self._process: subprocess.Popen[str] | None = None
        self._errors = scratch.with_suffix(".stderr")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def ask(self, number: int, skip: list[int]) -> Json:
        """Read a case; after a crash report it and start a new process for the next case."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        # The worker exits by itself if a case hangs; this is the fallback.
        timer = threading.Timer(3 * HANGING_SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps({"number": number, "skip": skip}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            answer: Json = json.loads(line)
            return answer
        status = self._stop()
        text = self._errors.read_text(errors="replace")[-6000:]
        hung = "Timeout (" in text
        error = "hang" if hung else f"process ended with {status}"
        return {"verdict": "failed", "error": error, "text": text, "cpu_seconds": 0.0}

    def _start(self) -> "subprocess.Popen[str]":
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MALLOC_ARENA_MAX": "2",
            "OMP_NUM_THREADS": "1",
            "HOME": str(self.scratch),
            "XDG_CACHE_HOME": str(self.scratch / "cache"),
            # Absolute, since a worker starts in another folder.
            "PYTHONPATH": os.pathsep.join(str(Path(e).resolve()) for e in sys.path if e),
        }
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), self.kind, str(self.seed), str(self.scratch)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=self.scratch,
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            text = self._errors.read_text(errors="replace")[-6000:]
            raise RuntimeError(f"{self.kind}: no case can be made:\n{text}")
        return self._process

    def _stop(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            return process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
        finally:
            process.stdout.close()


@dataclass
class Found:
    """Results of the cases of one kind.

    Attributes
    ----------
    accepted, rejected
        Number of cases read correctly, and rejected with a documented error.
    failures
        Other cases by error: number of the first, count, and necessary mutations.
    peak_bytes
        Peak memory of a process.
    cpu_seconds
        Total of all cases, and of the slowest.
    """

    accepted: int = 0
    rejected: int = 0
    failures: dict[str, Json] = field(default_factory=dict)
    peak_bytes: int = 0
    cpu_seconds: float = 0.0
    slowest_seconds: float = 0.0


class Campaign:
    """Cases of several kinds in parallel processes."""

    def __init__(self, seed: int, output: Path, scratch: Path) -> None:
        self.seed, self.output, self.scratch = seed, output, scratch
        self.found: dict[str, Found] = collections.defaultdict(Found)
        self._lock = threading.Lock()

    def run(self, numbers: dict[str, list[int]], jobs: int) -> None:
        """Read cases by number."""
        tasks = [
            (kind, of_kind[first : first + CHUNK])
            for kind, of_kind in numbers.items()
            for first in range(0, len(of_kind), CHUNK)
        ]
        with ThreadPoolExecutor(jobs) as threads:
            for _ in threads.map(self._run_chunk, range(len(tasks)), tasks):
                pass

    def _run_chunk(self, task: int, chunk: tuple[str, list[int]]) -> None:
        kind, numbers = chunk
        with Worker(kind, self.seed, self.scratch / f"{task}-{kind}") as worker:
            for number in numbers:
                self._count(worker, number, worker.ask(number, []))
        shutil.rmtree(worker.scratch, ignore_errors=True)

    def _count(self, worker: Worker, number: int, answer: Json) -> None:
        found = self.found[worker.kind]
        with self._lock:
            found.cpu_seconds += answer["cpu_seconds"]
            found.slowest_seconds = max(found.slowest_seconds, answer["cpu_seconds"])
            found.peak_bytes = max(found.peak_bytes, answer.get("peak_bytes", 0))
            if answer["verdict"] != "failed":
                found.accepted += answer["verdict"] == "accepted"
                found.rejected += answer["verdict"] == "rejected"
                return
            known = found.failures.get(answer["error"])
            if known is not None:
                known["count"] += 1
                return
            entry = found.failures[answer["error"]] = {"number": number, "count": 1, "skip": []}
        # Repeat failures, since a busy machine can cause timeouts.
        again = worker.ask(number, [])
        if again["verdict"] != "failed":
            with self._lock:
                del found.failures[answer["error"]]
                found.accepted += again["verdict"] == "accepted"
                found.rejected += again["verdict"] == "rejected"
            return
        if again["error"] != "hang":  # too slow to repeat many times
            entry["skip"] = self._shrink(worker, number, again["error"])
        self._keep(worker, number, entry, again)

    def _shrink(self, worker: Worker, number: int, error: str) -> list[int]:
        """Return the mutations that are not necessary for the same error."""
        skip: list[int] = []
        for step in range(MOST_STEPS):
            answer = worker.ask(number, [*skip, step])
            if answer["verdict"] == "failed" and answer["error"] == error:
                skip.append(step)
        return skip

    def _keep(self, worker: Worker, number: int, entry: Json, answer: Json) -> None:
        """Keep the files of a failure and report it."""
        worker.ask(number, entry["skip"])  # writes the files of the minimized case
        folder = self.output / f"{worker.kind}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        skip = "".join(f" --skip {step}" for step in entry["skip"])
        command = f"fuzz.py --seed {self.seed} --kind {worker.kind} --only {number}{skip}"
        (folder / "finding.txt").write_text(f"{command}\n{answer['error']}\n\n{answer['text']}\n")
        case = worker.scratch / "case"
        # Pipes and links into /dev cannot be copied; the seed recreates them.
        listed = [path for path in sorted(case.rglob("*")) if path.is_file()]
        for path in listed:
            if not path.is_symlink() and path.stat().st_size < 1 << 24:
                target = folder / path.relative_to(case)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        print(f"FAILED {worker.kind} {number}: {answer['error']}\n       {command}", flush=True)

    def table(self) -> str:
        """Return one line of results for each kind."""
        lines = ["kind             cases  accepted  rejected  failed  peak MB  slowest s  CPU s"]
        for kind, found in self.found.items():
            failed = sum(entry["count"] for entry in found.failures.values())
            cases = found.accepted + found.rejected + failed
            lines.append(
                f"{kind:<15} {cases:>6}  {found.accepted:>8}  {found.rejected:>8}  {failed:>6}  "
                f"{found.peak_bytes / 1e6:>7.0f}  {found.slowest_seconds:>9.2f}  "
                f"{found.cpu_seconds:>5.0f}"
            )
        return "\n".join(lines)

    @property
    def failed(self) -> bool:
        """Whether any case failed."""
        return any(found.failures for found in self.found.values())


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; return 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--kind", choices=KINDS, action="append", help="by default all")
    parser.add_argument("--only", type=int, action="append", help="numbers of cases")
    parser.add_argument("--skip", type=int, action="append", default=[], help="changes left out")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"))
    given = parser.parse_args(argv)
    kinds = given.kind or list(KINDS)
    given.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tjx-fuzz-") as scratch:
        if given.only:
            return _repeat(given, kinds, Path(scratch))
        campaign = Campaign(given.seed, given.output.absolute(), Path(scratch))
        numbers = {kind: [*range(at, given.cases, len(kinds))] for at, kind in enumerate(kinds)}
        campaign.run(numbers, given.jobs)
    print(campaign.table())
    print(f"{given.cases} cases, seed {given.seed}, {time.monotonic() - began:.0f} s")
    summary = {kind: vars(found) for kind, found in campaign.found.items()}
    (given.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return int(campaign.failed)


def _repeat(given: argparse.Namespace, kinds: list[str], scratch: Path) -> int:
    """Repeat single cases and print all details."""
    failed = False
    for kind in kinds:
        with Worker(kind, given.seed, scratch / kind) as worker:
            for number in given.only:
                answer = worker.ask(number, given.skip)
                failed |= answer["verdict"] == "failed"
                print(f"{kind} {number}: {json.dumps(answer, indent=1)}")
                print(answer.get("text", ""))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
