"""Pair campaign: of two different runs that start in one new directory, one must win unharmed.

    ./pants run tools/campaigns/pairs.py -- --seed 1 --pairs 200 [--output FILE]

Two processes with different settings start in the same new directory within a random interval.
`storage_run` lists which parts of these programs are real. One must finish with the leaves,
metrics, configuration and files of the same run alone; the other must end with exit code 2 and no
traceback.
"""

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from campaigns.faults import run_in_child, start_child, wait_for_child
from campaigns.storage_run import StorageRun
from campaigns.tiny_run import Flags

from tjx_trainer.runtime.exit_codes import ExitCode

KINDS: dict[str, Flags] = {
    "plain": {},
    "seed": {"seed": 7},
    "rate": {"optimizer.learning_rate": 1e-3},
    "high rate": {"optimizer.learning_rate": 1e-2},
    "dropout": {"model.dropout": 0.2},
}
"""Flags by which the runs of a pair differ; none resumes another."""


@dataclass
class Found:
    """Results of a campaign: winners by kind and place, and a line for each failure."""

    winners: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)


class Campaign:
    """Pairs of runs, compared with each run alone.

    Parameters
    ----------
    folder
        Working folder.
    seed
        Selects the kinds and the intervals.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._draw = random.Random(seed)  # noqa: S311  moments, not secrets
        self._program = StorageRun(folder)
        self.found = Found()
        self._alone: dict[str, Any] = {}
        begin = time.monotonic()
        for kind in KINDS:
            run, printed = folder / "run", folder / "printed"
            code = run_in_child(partial(self._train, kind, run), printed)
            if code != 0:
                raise AssertionError(printed.read_text())
            self._alone[kind] = self._result(run)
            shutil.rmtree(run)
        self._seconds = (time.monotonic() - begin) / len(KINDS)

    def run(self, pairs: int) -> Found:
        """Run a number of pairs."""
        for number in range(pairs):
            kinds = self._draw.sample(sorted(KINDS), 2)
            problems = self._race(kinds, self._draw.choice((0, 0.05, 1)))
            self.found.failures += [
                f"pair {number}, {' and '.join(kinds)}: {line}" for line in problems
            ]
            shutil.rmtree(self._folder / "run", ignore_errors=True)
            if (number + 1) % 50 == 0:
                print(f"{number + 1} pairs, {len(self.found.failures)} failures", flush=True)
        return self.found

    def _race(self, kinds: list[str], longest: float) -> list[str]:
        """Start two kinds within `longest` times the time of a run; return the problems found."""
        run = self._folder / "run"
        files = [self._folder / "first", self._folder / "second"]
        children = []
        for kind, file in zip(kinds, files, strict=True):
            children.append(start_child(partial(self._train, kind, run), file))
            time.sleep(self._draw.uniform(0, longest * self._seconds))
        codes = [wait_for_child(child) for child in children]
        printed = [file.read_text() for file in files]
        problems = [f"a traceback:\n{text[-2000:]}" for text in printed if "Traceback" in text]
        if sorted(codes) != [ExitCode.FINISHED, ExitCode.USER_ERROR]:
            last = "".join(text[-1000:] for text in printed)
            return [*problems, f"exit codes are {codes}:\n{last}"]
        place = codes.index(ExitCode.FINISHED)
        self.found.winners[f"{kinds[place]}, started {('first', 'second')[place]}"] += 1
        result, alone = self._result(run), self._alone[kinds[place]]
        return problems + [
            f"{name} is {str(result[name])[:300]} and should be {str(alone[name])[:300]}"
            for name in alone
            if result[name] != alone[name]
        ]

    def _train(self, kind: str, run: Path) -> int:
        return self._program.train(run, KINDS[kind])

    def _result(self, run: Path) -> dict[str, Any]:
        places = (run, run / "checkpoints")
        return {
            **self._program.outcome(run),
            "config": (run / "config.yaml").read_text(),
            "files": sorted(str(path) for place in places for path in place.iterdir()),
        }


def main() -> int:
    """Run a campaign from the command line; return 1 if a pair failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pairs-") as folder:
        begin = time.monotonic()
        found = Campaign(Path(folder), options.seed).run(options.pairs)
        print(f"{options.pairs} pairs in {time.monotonic() - begin:.0f} s")
    print("\n".join([f"{len(found.failures)} failures", *found.failures]))
    if options.output:
        options.output.write_text(json.dumps(vars(found), indent=2) + "\n")
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
