"""Corruption campaign: each of many damages to a checkpoint must be detected, named and survived.

    ./pants run tools/campaigns/corruption.py -- --seed 1 --cases 1000 [--output FILE]

A trainer run writes three checkpoints. Each case copies them, damages the newest once, and
restores. `verify` must detect and name the damaged file, the damaged step must be set aside, and
the step before must be restored bit for bit. Damages that change nothing, such as zeroing zeros,
are not counted.
"""

import argparse
import collections
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from campaigns.damage import DAMAGES, MANIFEST, NoDamageError
from campaigns.outcome import abstract_of, digest_leaves
from campaigns.tiny_run import TINY, TinyRun, clean_environment, write_text

import tjx_ckpt


@dataclass
class Tally:
    """Results of the cases of one kind of damage.

    Attributes
    ----------
    cases
        Number of cases.
    detected, named, set_aside, restored
        Cases that `verify` detected; whose damaged files were named, also in the warning of the
        restore; whose step was renamed; whose previous step was restored bit for bit.
    """

    cases: int = 0
    detected: int = 0
    named: int = 0
    set_aside: int = 0
    restored: int = 0

    @property
    def perfect(self) -> bool:
        """Whether every case passed."""
        return {self.detected, self.named, self.set_aside, self.restored} == {self.cases}


@dataclass
class Found:
    """Results of a campaign.

    Attributes
    ----------
    kinds
        Results by kind of damage.
    failures
        Failed cases, one or more lines each.
    """

    kinds: dict[str, Tally] = field(default_factory=lambda: collections.defaultdict(Tally))
    failures: list[str] = field(default_factory=list)


def train(folder: Path) -> Path:
    """Train with the real trainer into a run directory with three checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "rhyme.txt", lines=400)
    flags = {**TINY, "data.path": "rhyme.txt", "train.max_steps": 15, "checkpoint.every": 5}
    run = TinyRun(folder=folder, environment=clean_environment(folder / "home"), flags=flags)
    run.finish()
    assert run.saved() == [5, 10, 15]
    return run.run_dir


class Campaign:
    """Damages to the checkpoints of one run.

    Parameters
    ----------
    run_dir
        With three checkpoints or more; it is not changed.
    folder
        Folder of the copies.
    """

    def __init__(self, run_dir: Path, folder: Path) -> None:
        self._pristine = run_dir / "checkpoints"
        self._abstract = abstract_of(run_dir)
        self._copy = folder / "damaged"
        self._steps = tjx_ckpt.list_steps(self._pristine)
        with tjx_ckpt.Checkpointer(self._pristine) as checkpointer:
            self._digests = {
                step: digest_leaves(checkpointer.restore(self._abstract, step=step))
                for step in self._steps
            }
        self.found = Found()

    def run(self, *, seed: int, cases: int) -> Found:
        """Run a number of cases, equally many of each kind; return the results."""
        draw = random.Random(seed)  # noqa: S311  damage, not secrets
        kinds = list(DAMAGES)
        done = 0
        while done < cases:
            kind = kinds[done % len(kinds)]
            shutil.rmtree(self._copy, ignore_errors=True)
            shutil.copytree(self._pristine, self._copy)
            newest = self._copy / str(self._steps[-1])
            try:
                damaged = DAMAGES[kind](newest, draw)
            except NoDamageError:
                continue
            self._judge(kind, damaged)
            done += 1
            if done % 100 == 0:
                print(f"{done} cases, {len(self.found.failures)} failures", flush=True)
        return self.found

    def _judge(self, kind: str, damaged: list[str]) -> None:
        """Restore from the damaged copy and count the result."""
        tally = self.found.kinds[kind]
        tally.cases += 1
        try:
            found = self._restore(damaged)
        except Exception as error:  # any error is recorded, and the campaign continues
            self.found.failures.append(f"{kind} of {damaged}: {type(error).__name__}: {error}")
            return
        for name in ("detected", "named", "set_aside", "restored"):
            setattr(tally, name, getattr(tally, name) + found[name])
        if not all(found.values()):
            self.found.failures.append(f"{kind} of {damaged}: {found}")

    def _restore(self, damaged: list[str]) -> dict[str, bool]:
        before = self._steps[-2]
        # A damaged manifest does not describe other files.
        wanted = [MANIFEST] if MANIFEST in damaged else damaged
        with tjx_ckpt.Checkpointer(self._copy) as checkpointer:
            checkpointer.claim()
            newest = checkpointer.steps()[-1]
            problems = checkpointer.verify(newest)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                state = checkpointer.restore(self._abstract)
            warned = "\n".join(str(warning.message) for warning in caught)
            return {
                "detected": bool(problems),
                "named": all(name in warned and name in "\n".join(problems) for name in wanted),
                "set_aside": checkpointer.steps() == self._steps[:-1]
                and (self._copy / f"{newest}.corrupt").is_dir(),
                "restored": digest_leaves(state) == self._digests[before],
            }


def table(found: Found) -> str:
    """Return the results by kind of damage, one line each."""
    names = ("cases", "detected", "named", "set_aside", "restored")
    lines = [f"{'damage':<26}" + "".join(f"{name:>10}" for name in names)]
    lines += [
        f"{kind:<26}" + "".join(f"{getattr(tally, name):>10}" for name in names)
        for kind, tally in found.kinds.items()
    ]
    totals = (sum(getattr(tally, name) for tally in found.kinds.values()) for name in names)
    return "\n".join([*lines, f"{'all':<26}" + "".join(f"{total:>10}" for total in totals)])


def report(found: Found, *, seed: int, seconds: float) -> dict[str, Any]:
    """Return the content of the results file."""
    return {
        "about": {
            "command": f"./pants run tools/campaigns/corruption.py -- --seed {seed}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "seconds": round(seconds),
        },
        "seed": seed,
        "cases": sum(tally.cases for tally in found.kinds.values()),
        "by_damage": {kind: vars(tally) for kind, tally in found.kinds.items()},
        "failures": found.failures,
    }


def main() -> int:
    """Run a campaign from the command line; return 1 if a damage was missed or not survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="corruption-") as folder:
        campaign = Campaign(train(Path(folder) / "trained"), Path(folder))
        found = campaign.run(seed=options.seed, cases=options.cases)
    print(table(found))
    print("\n".join(found.failures))
    if options.output is not None:
        results = report(found, seed=options.seed, seconds=time.monotonic() - begin)
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
