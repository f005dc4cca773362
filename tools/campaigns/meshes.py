"""Mesh campaign: `train.reproducible mesh` must give the same bits on every mesh.

    ./pants run tools/campaigns/meshes.py -- --seed 1 --sequences 20 [--steps 200] [--output FILE]

A run with dropout, accumulation, bf16 and packed documents is trained on each mesh of `table`: 1 to
8 CPU devices along data or fsdp (ZeRO 1, 2, 3) in 1, 2 or 4 processes. Other runs are killed by
``kill -9`` and resumed on random meshes of the table until they finish. Every leaf of the last
checkpoint and every logged number of training must equal those of the first mesh.
"""

import argparse
import datetime
import os
import platform
import random
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from campaigns.outcome import Outcome, conclude, describe_difference, outcome
from campaigns.tiny_run import (
    TINY,
    Flags,
    RunProcess,
    TinyRun,
    clean_environment,
    write_documents,
)

FLAGS: Flags = {
    **TINY,
    "train.batch_size": 16,
    "train.precision": "bf16",
    "train.reproducible": "mesh",
    "train.eval_every": 1000,
    "train.eval_tokens": 200,
    "data.path": "rhymes.jsonl",
    "data.cache_dir": "prepared",
    "data.packing": "documents",
    "data.holdout": "documents",
    "checkpoint.every": 20,
    "distributed.heartbeat_timeout": 30,
}  # fmt: skip


class Mesh(NamedTuple):
    """A mesh of CPU devices: one axis, its ZeRO stage, and the number of processes."""

    devices: int
    axis: str
    zero: int
    processes: int

    @property
    def name(self) -> str:
        """The mesh for reports."""
        stage = f" zero {self.zero}" if self.axis == "fsdp" else ""
        return f"{self.axis} {self.devices}{stage} in {self.processes} processes"


def table() -> Iterator[Mesh]:
    """Yield every mesh of the campaign; the first is a single device."""
    for devices in (1, 2, 4, 8):
        for axis, zero in (("data", 3), ("fsdp", 1), ("fsdp", 2), ("fsdp", 3)):
            for processes in (1, 2, 4):
                if processes <= devices and (devices > 1 or axis == "data"):
                    yield Mesh(devices, axis, zero, processes)


@dataclass
class Found:
    """Results of a campaign: compared runs, kills, and a line for each difference."""

    meshes: list[str] = field(default_factory=list)
    sequences: list[list[str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def start(run: TinyRun, mesh: Mesh) -> list[RunProcess]:
    """Start or resume a run in the processes of a mesh."""
    flags: dict[str, str | int | float] = {
        "mesh_data": 1, f"mesh_{mesh.axis}": mesh.devices, "mesh_zero": mesh.zero,
    }  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    if mesh.processes > 1:
        flags |= {
            "distributed_coordinator": address, "distributed_num_processes": mesh.processes,
        }  # fmt: skip
    started = []
    for index in range(mesh.processes):
        if mesh.processes > 1:
            flags["distributed_process_id"] = index
        one = run.elsewhere(run.folder, **flags)
        started.append(one.start(JAX_NUM_CPU_DEVICES=str(mesh.devices // mesh.processes)))
    return started


def finish(run: TinyRun, mesh: Mesh) -> Outcome:
    """Run to the end; return the outcome without what depends on the mesh."""
    processes = start(run, mesh)
    codes = [each.process.wait() for each in processes]
    if any(codes):
        raise AssertionError(f"{mesh.name}: ended with {codes}:\n{processes[0].printed}")
    return training_outcome(run)


def training_outcome(run: TinyRun) -> Outcome:
    """Return the outcome of training; evaluation adds in the order of its own mesh."""
    found = outcome(run.run_dir)
    numbers = {key: text for key, text in found.numbers.items() if key[1].startswith("train/")}
    return replace(found, numbers=numbers, files=frozenset())


def kill_and_resume(run: TinyRun, draw: random.Random) -> tuple[list[str], Outcome]:
    """Kill and resume a run on random meshes; return their names and the outcome."""
    meshes, names = list(table()), []
    for _ in range(draw.randint(1, 3)):
        mesh = draw.choice(meshes)
        names.append(mesh.name)
        processes = start(run, mesh)
        before, more = max(run.saved(), default=0), draw.randint(1, 3)
        enough = before + more * int(run.flags["checkpoint.every"])
        while max(run.saved(), default=0) < enough and processes[0].process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        for process in processes:
            process.kill()
    mesh = draw.choice(meshes)
    return [*names, mesh.name], finish(run, mesh)


def campaign(run: TinyRun, meshes: list[Mesh], *, seed: int, sequences: range) -> Found:
    """Compare a run on all meshes, then random sequences of meshes, with the first mesh."""
    found, expected = Found(), None
    for number, mesh in enumerate(meshes):
        here = _prepared(run, f"mesh-{number}")
        compare(here, mesh, expected, found)
        expected = expected or training_outcome(here)
        print(f"{mesh.name}: {len(found.failures)} failures", flush=True)
    assert expected is not None
    for number in sequences:
        here = _prepared(run, f"sequence-{number}")
        draw = random.Random(f"{seed} {number}")  # noqa: S311  moments, not secrets
        names, result = kill_and_resume(here, draw)
        found.sequences.append(names)
        found.failures += [f"{names}: {line}" for line in describe_difference(result, expected)]
        print(f"{' -> '.join(names)}: {len(found.failures)} failures", flush=True)
    return found


def _prepared(run: TinyRun, name: str) -> TinyRun:
    """Return the run in a subfolder, with its text."""
    here = run.elsewhere(run.folder / name)
    here.folder.mkdir(parents=True)
    write_documents(here.folder / "rhymes.jsonl", count=400)
    return here


def compare(run: TinyRun, mesh: Mesh, expected: Outcome | None, found: Found) -> None:
    """Finish a run on a mesh and record how it differs from the expected outcome."""
    result = finish(run, mesh)
    lines = describe_difference(result, expected) if expected else []
    found.failures += [f"{mesh.name}: {line}" for line in lines]
    found.meshes.append(mesh.name)


def report(found: Found, *, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return the content of the results file."""
    return {
        "about": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "seconds": round(seconds),
        },
        "seed": options.seed,
        "steps": options.steps,
        "first_sequence": options.first,
        "meshes": found.meshes,
        "sequences": found.sequences,
        "failures": found.failures,
    }


def main() -> int:
    """Run a campaign from the command line; return 1 if bits differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=20, help="runs killed and resumed")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--every", type=int, default=1, help="take every n-th mesh of the table")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    folder, begin = Path(tempfile.mkdtemp(prefix="meshes-")), time.monotonic()
    flags = {**FLAGS, "train.max_steps": options.steps}
    run = TinyRun(folder=folder, environment=clean_environment(folder / "home"), flags=flags)
    meshes = list(table())[:: options.every]
    sequences = range(options.first, options.first + options.sequences)
    found = campaign(run, meshes, seed=options.seed, sequences=sequences)
    results = report(found, options=options, seconds=time.monotonic() - begin)
    return conclude(results, folder, failed=bool(found.failures), output=options.output)


if __name__ == "__main__":
    sys.exit(main())
