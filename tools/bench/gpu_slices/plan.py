"""Stages of the four slices: processes, their order and time limits."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from gpu_slices.programs import Machine, Programs, Run
from gpu_slices.runner import Stage, Step
from gpu_slices.sizes import Sizes

# Seconds per slice, including initial checks and the archive.
LIMITS = {1: 300.0, 2: 540.0, 3: 540.0, 4: 540.0}


class Plan:
    """Builds the slices.

    Parameters
    ----------
    sizes, machine, work, keep
        As for `Programs`.
    winner : Run or None
        Fastest run of earlier slices, for slices 3 and 4; None means the trainer's defaults.
    """

    def __init__(
        self, sizes: Sizes, machine: Machine, *, work: Path, keep: Path, winner: Run | None
    ) -> None:
        self._sizes, self._machine = sizes, machine
        self._programs = Programs(sizes, machine, work=work, keep=keep)
        # XLA autotunes while compiling; run no other process meanwhile.
        self._alone = Programs(sizes, machine, work=work, keep=keep, compiled="compiled-alone")
        self._winner = winner or Run("default", (), sizes.batch, sizes.steps)

    def slice(self, number: int) -> list[Stage]:
        """Return the stages of a slice."""
        stages = {1: self._first, 2: self._second, 3: self._third, 4: self._fourth}[number]()
        factor = self._sizes.patience
        return [
            replace(
                stage,
                seconds=factor * stage.seconds,
                steps=[replace(step, seconds=factor * step.seconds) for step in stage.steps],
            )
            for stage in [Stage("data", [self._programs.corpus()], 60.0), *stages]
        ]

    def _first(self) -> list[Stage]:
        """Smoke test: attention of every implementation, and 20 steps of the trainer."""
        programs, sizes = self._programs, self._sizes
        run = Run("default", (), sizes.smoke_batch, sizes.smoke_steps)
        compiling = programs.train(run, compile_only=True)
        return [
            self._together(
                "attention, and compiling", 200.0, [compiling], programs.checks("smoke")
            ),
            Stage("trainer", [programs.train(run, seconds=150.0)], 150.0),
        ]

    def _second(self) -> list[Stage]:
        """Correctness, the trainer by implementation and layer loop, the attention benchmark."""
        programs, sizes = self._programs, self._sizes
        runs = [
            Run(
                f"{name}-{'scan' if scan == 'true' else 'unrolled'}",
                (f"--model.attention_implementation={name}", f"--model.scan_layers={scan}"),
                sizes.batch,
                sizes.steps,
            )
            for scan in ("false", "true")
            for name in self._trainable()
        ]
        refused = [
            Step(f"trainer-{name}", (), 0.0, skip=reason)
            for name, reason in self._machine.implementations.items()
            if reason is not None
        ]
        return [
            self._together(
                "correctness, and compiling",
                270.0,
                [programs.train(run, compile_only=True) for run in runs],
                [*programs.checks("rest"), *programs.tests()],
            ),
            Stage("trainer", [*(programs.train(run) for run in runs), *refused], 300.0),
            Stage("attention benchmark", [programs.attention_benchmark()], 150.0),
        ]

    def _third(self) -> list[Stage]:
        """Batch sizes, XLA flags and head chunk sizes of the trainer, and the step of torch."""
        programs, sizes, flags = self._programs, self._sizes, self._winner.flags
        runs = [Run("base", flags, sizes.batch, sizes.steps)]
        runs += [Run(f"batch-{n}", flags, n, sizes.steps) for n in sizes.other_batches]
        runs += [
            Run(name, flags, sizes.batch, sizes.steps, xla_flags=xla_flags)
            for name, xla_flags in sizes.xla_flags.items()
        ]
        first, *others = (programs.train(run) for run in runs)
        compiling = [programs.train(run, compile_only=True) for run in runs]
        return [
            self._together("compiling", 260.0, compiling, [programs.peer(compile_only=True)]),
            Stage("trainer and torch", [first, programs.peer(), *others], 330.0),
            Stage("head loss", [programs.head_loss()], 90.0),
        ]

    def _fourth(self) -> list[Stage]:
        """Repeats of the fastest run, bitwise-equal resume, and block sizes."""
        programs, winner, sizes = self._programs, self._winner, self._sizes
        runs = [
            Run(f"repeat-{n}", winner.flags, winner.batch, sizes.steps, winner.xla_flags)
            for n in range(1, sizes.repeats + 1)
        ]
        repeats = [self._alone.train(run, seconds=150.0) for run in runs]
        stages = [
            Stage("repeats", repeats, 270.0),
            Stage("resume", [programs.resume(winner, deterministic=True)], 200.0),
            Stage("block sizes", [programs.tune(winner)], 150.0),
        ]
        if not sizes.tiny:  # CPUs are deterministic by default
            last = programs.resume(winner, deterministic=False)
            stages.append(Stage("resume with the defaults", [last], 200.0))
        return stages

    def _trainable(self) -> list[str]:
        """Return the implementations that support training here, or "xla" if none does."""
        reasons = self._machine.implementations
        return [name for name in reasons if reasons[name] is None and name != "xla"] or ["xla"]

    def _together(
        self, name: str, seconds: float, steps: Sequence[Step], others: Sequence[Step]
    ) -> Stage:
        """Interleave steps of two kinds, to run in parallel."""
        mixed = [step for step in chain(*zip_longest(steps, others)) if step is not None]
        return Stage(name, mixed, seconds, parallel=self._machine.processes)


def fastest(files: Sequence[Path]) -> Run:
    """Return the fastest run of the trainer in result files of slices 2 and 3.

    Raises
    ------
    ValueError
        If no run of the trainer succeeded in them.
    """
    cases: list[dict[str, Any]] = [
        case for file in files for case in json.loads(file.read_text())["cases"]
    ]
    runs = [
        case
        for case in cases
        if case["step"].startswith("trainer-") and case.get("tokens_per_sec") is not None
    ]
    if not runs:
        raise ValueError(
            f"--previous: got {', '.join(map(str, files))}; expected results with a successful run "
            "of the trainer; run slice 2 first"
        )
    best = max(runs, key=lambda case: case["tokens_per_sec"])
    return Run(best["case"], best["varied"], best["batch"], best["steps"], best["xla_flags"])
