"""Kill campaign: training runs killed at random moments must match an undisturbed run.

    ./pants run tools/campaigns/kills.py -- --seed 1 --kills 200 [--workers 2] [--output FILE]
    ./pants run tools/campaigns/kills.py -- --seed 1 --kills 50 --workers 1 --stream

A run is killed by ``kill -9`` and restarted until it finishes. Then every leaf of its last
checkpoint, every logged number and its file names are compared with those of the same run without
kills. Some moments are uniform over the lifetime of a process, startup included; others are aimed
at saves. The files on disk after a kill show which phase it hit. With --stream the runs read a
mixture of three streams, in two processes that are killed together.
"""

import argparse
import collections
import concurrent.futures
import datetime
import os
import platform
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from campaigns.meshes import Mesh, start
from campaigns.outcome import Outcome, conclude, describe_difference, outcome
from campaigns.tiny_run import (
    TINY,
    Flags,
    RunProcess,
    TinyRun,
    clean_environment,
    write_documents,
    write_text,
)

MAX_STEPS = 120
# Training takes about as long as startup, and half of it overlaps with saves.
_COMMON: Flags = {
    **TINY, "train.max_steps": MAX_STEPS, "train.eval_every": 45, "checkpoint.every": 6,
    "data.cache_dir": "prepared",
}  # fmt: skip
# Two kinds of runs alternate, with complementary parts in their state.
KINDS: Mapping[str, Flags] = {
    "windows, fp32": {**_COMMON, "data.path": "rhyme.txt"},
    "documents, fp16, average": {
        **_COMMON, "data.path": "rhymes.jsonl", "data.packing": "documents",
        "data.holdout": "documents", "train.precision": "fp16", "guard.growth_interval": 20,
        "optimizer.ema_decay": 0.9,
    },
}  # fmt: skip
# The runs of --stream: their states are recorded every few seconds.
STREAMS: Mapping[str, Flags] = {
    "stream of 3 sources, 2 processes": {
        **_COMMON, "data.mixture": "rhymes.jsonl=0.5,songs.jsonl=0.3,plays.jsonl=0.2",
        "data.stream": "true", "data.shuffle_buffer": 64, "data.holdout": "documents",
        "data.tokenizer": "byte", "train.max_steps": 200, "checkpoint.every": 10,
    },
}  # fmt: skip
MOMENTS = ("start-up", "training", "saving", "deleting an old step", "ending")
ONE_DEVICE = Mesh(devices=1, axis="data", zero=3, processes=1)
TWO_PROCESSES = Mesh(devices=2, axis="data", zero=3, processes=2)
AIMED = 0.4  # share of the kills that are aimed at a save
MOST_LIVES = 200  # limit of restarts; beyond it a run makes no progress


@dataclass
class Found:
    """Results of a campaign.

    Attributes
    ----------
    moments
        Number of kills by phase.
    runs
        Number of finished and compared runs by kind.
    failures
        Failed runs, one or more lines each.
    """

    moments: collections.Counter[str] = field(default_factory=collections.Counter)
    runs: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """An undisturbed run for comparison.

    Attributes
    ----------
    run
        The run that is copied and killed.
    expected
        Its outcome.
    seconds
        Lifetime of its process with a warm compilation cache.
    save_seconds
        Duration of a save.
    mesh
        The mesh of the runs.
    """

    run: TinyRun
    expected: Outcome
    seconds: float
    save_seconds: float
    mesh: Mesh = ONE_DEVICE


class Campaign:
    """Kill runs a number of times, then finish those in progress.

    Parameters
    ----------
    references
        Runs to compare with, by kind; kinds alternate.
    seed
        Seed of the moments: those of run n are a function of (seed, n).
    kills
        Number of kills; finishing the last runs can add some.
    folder
        Folder of the runs; passed ones are deleted.
    """

    def __init__(
        self, references: Mapping[str, Reference], *, seed: int, kills: int, folder: Path
    ) -> None:
        self._references = references
        self._seed, self._kills, self._folder = seed, kills, folder
        self._lock = threading.Lock()
        self._next = 0
        self.found = Found()

    def run(self, workers: int = 1) -> Found:
        """Run the campaign; return its results."""
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(self._work) for _ in range(workers)]:
                done.result()
        return self.found

    def _work(self) -> None:
        while True:
            with self._lock:
                number, self._next = self._next, self._next + 1
                if self.found.moments.total() >= self._kills:
                    return
            self._disturb(number)

    def _disturb(self, number: int) -> None:
        """Kill one run repeatedly until it finishes; compare its outcome."""
        kind = list(self._references)[number % len(self._references)]
        reference = self._references[kind]
        draw = random.Random(f"{self._seed} {number}")  # noqa: S311  moments, not secrets
        run = reference.run.elsewhere(self._folder / f"run-{number}")
        write_data(run.folder)
        try:
            for _ in range(MOST_LIVES):
                before = _trained(run)
                processes = start(run, reference.mesh)
                if not _kill_at_random(processes, run, reference, draw):
                    break
                self._count(_moment(run, before))
            else:
                raise AssertionError(f"no end after {MOST_LIVES} lives")
            codes = [process.wait() for process in processes]
            if any(codes):
                raise AssertionError(f"ended with {codes}:\n{processes[0].printed}")
            difference = describe_difference(outcome(run.run_dir), reference.expected)
            if difference:
                raise AssertionError("; ".join(difference))
        except Exception as error:  # any error is recorded, and the campaign continues
            with self._lock:
                self.found.failures.append(f"run {number} ({kind}) in {run.folder}: {error}")
        else:
            shutil.rmtree(run.folder)
        with self._lock:
            self.found.runs[kind] += 1

    def _count(self, moment: str) -> None:
        with self._lock:
            self.found.moments[moment] += 1
            done = self.found.moments.total()
        if done % 20 == 0:
            print(f"{done} kills, {len(self.found.failures)} failures", flush=True)


def refer(flags: Flags, folder: Path, environment: Mapping[str, str], mesh: Mesh) -> Reference:
    """Finish a run twice without kills: the first compiles, the second is timed."""
    first, again = (
        TinyRun(folder=folder / name, environment=environment, flags=flags)
        for name in ("first", "again")
    )
    for run in (first, again):
        write_data(run.folder)
    for run in (first, again):
        begin = time.monotonic()
        processes = start(run, mesh)
        save_seconds = _time_saves(processes[0], run)
        codes = [process.wait() for process in processes]
        if any(codes):
            raise AssertionError(processes[0].printed)
        seconds = time.monotonic() - begin
    expected = outcome(first.run_dir)
    if difference := describe_difference(outcome(again.run_dir), expected):
        raise AssertionError(f"two undisturbed runs differ: {difference}")
    return Reference(first, expected, seconds, save_seconds, mesh)


def write_data(folder: Path) -> None:
    """Write the texts of `KINDS` and `STREAMS`."""
    folder.mkdir(parents=True)
    write_text(folder / "rhyme.txt", lines=400)
    write_documents(folder / "rhymes.jsonl", count=400)
    write_documents(folder / "songs.jsonl", count=300, word="river")
    write_documents(folder / "plays.jsonl", count=200, word="curtain")


def _time_saves(life: RunProcess, run: TinyRun) -> float:
    """Watch an undisturbed process; return the median duration of its saves in seconds."""
    begun: dict[str, float] = {}
    ended: dict[str, float] = {}
    while life.process.poll() is None:
        now, under_way = time.monotonic(), set(run.unfinished())
        for name in under_way:
            begun.setdefault(name, now)
        for name in begun.keys() - under_way:
            ended.setdefault(name, now)
        time.sleep(0.001)
    spans = sorted(ended[name] - begun[name] for name in ended)
    return spans[len(spans) // 2] if spans else 0.01


def _kill_at_random(
    processes: list[RunProcess], run: TinyRun, reference: Reference, draw: random.Random
) -> bool:
    """Kill a run at a random moment or during a save; return False if it ended first."""
    aimed, begin = draw.random() < AIMED, time.monotonic()
    moment = draw.uniform(0, reference.seconds)
    saves, into = draw.randint(1, 5), draw.uniform(0, 1.2 * reference.save_seconds)
    seen: set[str] = set(run.unfinished())  # leftovers of the previous process
    first = len(seen)
    while processes[0].process.poll() is None:
        if aimed:
            seen |= set(run.unfinished())
            due = len(seen) - first >= saves
        else:
            due = time.monotonic() - begin >= moment
        if due:
            if aimed:
                time.sleep(into)
            for process in processes:
                process.process.kill()
            # It may have finished in the meantime.
            codes = [process.process.wait() for process in processes]
            return min(codes) < 0
        time.sleep(0.001)
    return False


def _trained(run: TinyRun) -> int:
    """Return the size of metrics.jsonl in bytes, which grows with each step."""
    path = run.run_dir / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def _moment(run: TinyRun, before: int) -> str:
    """Return the phase that a kill hit, from the files on disk."""
    names = run.unfinished()
    if any(name.endswith(".discarded.tmp") for name in names):
        return "deleting an old step"
    if names:
        return "saving"
    if max(run.saved(), default=0) == run.flags["train.max_steps"]:
        return "ending"
    return "training" if _trained(run) != before else "start-up"


def report(found: Found, *, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return the content of the results file."""
    stream = " --stream" if options.stream else ""
    return {
        "about": {
            "command": f"./pants run tools/campaigns/kills.py -- --seed {options.seed}{stream}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "seconds": round(seconds),
        },
        "seed": options.seed,
        "kills": found.moments.total(),
        "by_moment": {moment: found.moments[moment] for moment in MOMENTS},
        "runs_ended_and_compared": dict(found.runs),
        "failures": found.failures,
    }


def main() -> int:
    """Run a campaign from the command line; return 1 if a run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=200, help="at least so many")
    parser.add_argument("--workers", type=int, default=2, help="runs beside each other")
    parser.add_argument("--stream", action="store_true", help="runs on streams in two processes")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    folder, begin = Path(tempfile.mkdtemp(prefix="kills-")), time.monotonic()
    environment = clean_environment(folder / "home")
    references = {}
    kinds, mesh = (STREAMS, TWO_PROCESSES) if options.stream else (KINDS, ONE_DEVICE)
    for number, (kind, flags) in enumerate(kinds.items()):
        references[kind] = refer(flags, folder / f"reference-{number}", environment, mesh)
        times = (references[kind].seconds, 1000 * references[kind].save_seconds)
        print("{}: a life of {:.1f} s, saves of {:.0f} ms".format(kind, *times), flush=True)
    campaign = Campaign(references, seed=options.seed, kills=options.kills, folder=folder)
    found = campaign.run(options.workers)
    results = report(found, options=options, seconds=time.monotonic() - begin)
    return conclude(results, folder, failed=bool(found.failures), output=options.output)


if __name__ == "__main__":
    sys.exit(main())
