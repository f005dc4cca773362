"""Pair campaign: of two different runs that start in one new directory, one must win unharmed.

    ./pants run tools/campaigns/pairs.py -- --seed 1 --pairs 200 [--output FILE]

Two processes with different seeds, learning rates, widths or texts start in the same new directory
within a random interval. One must finish with the leaves, metrics, configuration and files of the
same run alone; the other must end with exit code 2 and no traceback.
"""

import argparse
import collections
import datetime
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from campaigns.fork_server import ForkServer
from campaigns.outcome import Outcome, describe_difference, outcome
from campaigns.tiny_run import (
    TINY,
    TRAINER_MODULES,
    TinyRun,
    clean_environment,
    write_text,
)

from tjx_trainer.runtime.exit_codes import ExitCode

KINDS = {
    "plain": {},
    "seed": {"seed": 7},
    "rate": {"optimizer_learning_rate": 1e-3},
    "width": {"model_d_model": 16},
    "text": {"data_path": "other.txt"},
}  # fmt: skip
"""Flags by which the runs of a pair differ."""

_LONGEST_DELAY = 2.0  # seconds; a run alone takes about as long


@dataclass
class Found:
    """Results of a campaign: winners by kind and place, and a line for each failure."""

    winners: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """Outcome and configuration of a run alone."""

    outcome: Outcome
    config: str

    @classmethod
    def read(cls, run: TinyRun) -> "Reference":
        """Read a finished run; its folder is left out of the configuration."""
        config = (run.run_dir / "config.yaml").read_text().replace(str(run.folder), "")
        return cls(outcome(run.run_dir), config)


def campaign(run: TinyRun, *, seed: int, pairs: int) -> Found:
    """Run each kind alone, then random pairs of kinds in one directory."""
    found = Found()
    references = {}
    for kind, flags in KINDS.items():
        alone = _prepared(run, f"alone-{kind}", **flags)
        alone.finish()
        references[kind] = Reference.read(alone)
    draw = random.Random(seed)  # noqa: S311  moments, not secrets
    for number in range(pairs):
        kinds = draw.sample(sorted(KINDS), 2)
        problems = race(run, f"pair-{number}", kinds, draw, references, found)
        found.failures += [f"pair {number}, {' and '.join(kinds)}: {line}" for line in problems]
        if (number + 1) % 10 == 0:
            print(f"{number + 1} pairs, {len(found.failures)} failures", flush=True)
    return found


def race(
    run: TinyRun,
    name: str,
    kinds: list[str],
    draw: random.Random,
    references: dict[str, Reference],
    found: Found,
) -> list[str]:
    """Start two kinds in one new directory; return the problems found."""
    here = _prepared(run, name)
    first = here.elsewhere(here.folder, **KINDS[kinds[0]]).start()
    time.sleep(draw.choice((0.0, 0.05, 0.5, 1.0)) * draw.uniform(0, _LONGEST_DELAY))
    second = here.elsewhere(here.folder, **KINDS[kinds[1]]).start()
    codes = [first.wait(), second.wait()]
    problems = [
        f"traceback:\n{each.printed[-2000:]}"
        for each in (first, second)
        if "Traceback" in each.printed
    ]
    if sorted(codes) != [ExitCode.FINISHED, ExitCode.USER_ERROR]:
        return [*problems, f"exit codes {codes}:\n{first.printed[-1000:]}{second.printed[-1000:]}"]
    place = codes.index(ExitCode.FINISHED)
    found.winners[f"{kinds[place]}, started {('first', 'second')[place]}"] += 1
    result, expected = Reference.read(here), references[kinds[place]]
    problems += describe_difference(result.outcome, expected.outcome)
    if result.config != expected.config:
        problems.append("config.yaml is not that of the winner")
    if not problems:
        shutil.rmtree(here.folder)
    return problems


def _prepared(run: TinyRun, name: str, **flags: str | float) -> TinyRun:
    """Return the run in a subfolder, with both texts."""
    here = run.elsewhere(run.folder / name, **flags)
    here.folder.mkdir(parents=True)
    write_text(here.folder / "rhyme.txt", lines=400)
    write_text(here.folder / "other.txt", lines=401)
    return here


def report(found: Found, *, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return the content of the results file."""
    return {
        "about": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "seconds": round(seconds),
        },
        "seed": options.seed,
        "pairs": options.pairs,
        "winners": found.winners,
        "failures": found.failures,
    }


def main() -> int:
    """Run a campaign from the command line; return 1 if a pair failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    folder, begin = Path(tempfile.mkdtemp(prefix="pairs-")), time.monotonic()
    flags = {
        **TINY, "data.path": "rhyme.txt", "train.max_steps": 20, "checkpoint.every": 5,
    }  # fmt: skip
    run = TinyRun(folder=folder, environment=clean_environment(folder / "home"), flags=flags)
    server = ForkServer(run.environment, TRAINER_MODULES)
    try:
        found = campaign(replace(run, server=server), seed=options.seed, pairs=options.pairs)
    finally:
        server.stop()
    text = json.dumps(report(found, options=options, seconds=time.monotonic() - begin), indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")
    if found.failures:
        print(f"failed pairs are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
