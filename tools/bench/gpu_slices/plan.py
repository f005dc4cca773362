"""The four slices: which processes run, in which order, and how long each may take."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_slices.runner import Stage, Step
from gpu_slices.sizes import Sizes

# Seconds of a slice, its first checks and its archive included.
LIMITS = {1: 300.0, 2: 540.0, 3: 540.0, 4: 540.0}
TESTS = "packages/tjx-kernels/tests/test_kernels_on_gpu.py"


@dataclass(frozen=True)
class Machine:
    """What the probe said of this machine; see `gpu_slices.probe`.

    Attributes
    ----------
    implementations
        Attention implementations for GPUs in the order of tjx_kernels' table, and why one cannot
        train here, or None.
    trainer_flags
        Names of the flags that the trainer has.
    peak_flops
        FLOP/s in bfloat16, None where unknown.
    torch_python
        Interpreter that can import torch, or None.
    processes
        How many processes may compile at the same time.
    """

    implementations: Mapping[str, str | None]
    trainer_flags: Sequence[str]
    peak_flops: float | None
    torch_python: str | None
    processes: int


@dataclass(frozen=True)
class Run:
    """A run of the trainer.

    Attributes
    ----------
    name
        Names the case.
    flags
        Flags of the trainer in addition to those of all runs.
    batch, steps
        Sequences of a step, and steps.
    xla_flags
        Flags of XLA.
    """

    name: str
    flags: Sequence[str]
    batch: int
    steps: int
    xla_flags: str = ""


class Plan:
    """Builds the slices.

    Parameters
    ----------
    sizes : Sizes
        Of a GPU, or of a rehearsal.
    machine : Machine
        What is here.
    work : Path
        Folder for everything that does not come back.
    keep : Path
        Folder for files that come back in the archive.
    winner : Run or None
        Fastest run of slices 2 and 3, for slices 3 and 4; None takes the trainer's defaults.
    """

    def __init__(
        self, sizes: Sizes, machine: Machine, *, work: Path, keep: Path, winner: Run | None
    ) -> None:
        self._sizes, self._machine = sizes, machine
        self._work, self._keep = work, keep
        self._corpus = work / f"corpus-{sizes.vocabulary}.txt"
        self._cache = {
            "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        }
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
            for stage in stages
        ]

    # --- slices -----------------------------------------------------------------------------------

    def _first(self) -> list[Stage]:
        """Smoke: attention of every implementation, and 20 steps of the trainer."""
        run = Run("default", (), self._sizes.smoke_batch, self._sizes.smoke_steps)
        return [
            self._data(),
            self._together("attention, and compiling", 200.0, [
                *self._checks("smoke"), self._train(run, compile_only=True),
            ]),
            Stage("trainer", [self._train(run, seconds=150.0)], 150.0),
        ]  # fmt: skip

    def _second(self) -> list[Stage]:
        """Correctness, the trainer by implementation and layer loop, the attention benchmark."""
        runs = [
            Run(f"{name}-{layers}", (f"--model.attention_implementation={name}", flag),
                self._sizes.batch, self._sizes.steps)
            for layers, flag in (
                ("unrolled", "--model.scan_layers=false"), ("scan", "--model.scan_layers=true")
            )
            for name in self._trainable()
        ]  # fmt: skip
        refused = [
            Step(f"trainer-{name}", (), 0.0, skip=reason)
            for name, reason in self._machine.implementations.items()
            if reason is not None
        ]
        return [
            self._data(),
            self._together("correctness, and compiling", 270.0, [
                *(self._train(run, compile_only=True) for run in runs),
                *self._checks("rest"), *self._tests(),
            ]),
            Stage("trainer", [*(self._train(run) for run in runs), *refused], 300.0),
            Stage("attention benchmark", [self._attention_benchmark()], 150.0),
        ]  # fmt: skip

    def _third(self) -> list[Stage]:
        """Batch sizes, XLA flags and head chunks of the trainer, and torch's step beside them."""
        base, sizes = self._winner, self._sizes
        runs = [Run("base", base.flags, sizes.batch, sizes.steps)]
        runs += [Run(f"batch-{n}", base.flags, n, sizes.steps) for n in sizes.other_batches]
        runs += [
            Run(name, base.flags, sizes.batch, sizes.steps, xla_flags=flags)
            for name, flags in sizes.xla_flags.items()
        ]
        return [
            self._data(),
            self._together("compiling", 260.0, [
                *(self._train(run, compile_only=True) for run in runs),
                self._peer(compile_only=True),
            ]),
            Stage("trainer and torch", [
                self._train(runs[0]), self._peer(), *(self._train(run) for run in runs[1:]),
            ], 330.0),
            Stage("head loss", [
                self._step("head_loss", "gpu_slices.head_loss", sizes.head_loss, 90.0),
            ], 90.0),
        ]  # fmt: skip

    def _fourth(self) -> list[Stage]:
        """Repeats of the fastest run, resuming bit for bit, and block sizes."""
        winner, sizes = self._winner, self._sizes
        runs = [
            Run(f"repeat-{n}", winner.flags, winner.batch, sizes.steps, winner.xla_flags)
            for n in range(1, sizes.repeats + 1)
        ]
        return [
            self._data(),
            # Compiled alone, so that XLA's choice of kernels is not disturbed.
            Stage("repeats", [self._train(run, seconds=150.0) for run in runs], 270.0),
            Stage("resume", self._resumes(), 240.0),
            Stage("block sizes", [self._tune()], 150.0),
        ]

    # --- processes --------------------------------------------------------------------------------

    def _together(self, name: str, seconds: float, steps: Sequence[Step]) -> Stage:
        return Stage(name, steps, seconds, parallel=self._machine.processes)

    def _step(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        seconds: float,
        environment: Mapping[str, str] | None = None,
    ) -> Step:
        command = [sys.executable, "-m", module, *arguments]
        return Step(name, command, seconds, environment or {})

    def _data(self) -> Stage:
        sizes = self._sizes
        words = [str(self._corpus), f"--vocabulary={sizes.vocabulary}", f"--tokens={sizes.tokens}"]
        return Stage("data", [self._step("corpus", "gpu_slices.corpus", words, 60.0)], 60.0)

    def _checks(self, suite: str) -> list[Step]:
        tiny = ["--tiny"] if self._sizes.tiny else []
        return [
            self._step(
                f"check-{name}",
                "gpu_slices.attention_check",
                [f"--implementation={name}", f"--cases={suite}", *tiny],
                90.0,
                {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            )
            for name in self._machine.implementations
        ]

    def _tests(self) -> list[Step]:
        """Return the tests of the real kernels, a process for each implementation."""
        words = ["-p", "gpu_slices.pytest_cases", "-p", "no:faulthandler", "-m", "gpu"]
        words += ["-W", "default", "--tb=short", TESTS]
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if not self._sizes.tiny:
            environment["JAX_PLATFORMS"] = "cuda,cpu"
        return [
            self._step(f"tests-{name}", "pytest", [*words, "-k", name], 200.0, environment)
            for name in self._machine.implementations
        ]

    def _trainable(self) -> list[str]:
        """Return the implementations whose kernels can train here, or "xla" where none can."""
        found = [name for name, reason in self._machine.implementations.items() if reason is None]
        return [name for name in found if name != "xla"] or ["xla"]

    def _train(self, run: Run, *, compile_only: bool = False, seconds: float = 90.0) -> Step:
        name = f"compile-{run.name}" if compile_only else f"trainer-{run.name}"
        flags = self._flags()
        words = [f"--case={run.name}", f"--folder={self._work / 'runs'}", f"--keep={self._keep}"]
        words += [f"--batch={run.batch}", f"--steps={run.steps}"]
        words += [*(f"--varied={flag}" for flag in run.flags)]
        words.append("--compile-only" if compile_only else "--profile")
        environment = dict(self._cache)
        if run.xla_flags:
            environment["XLA_FLAGS"] = run.xla_flags
        if compile_only:
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
            seconds = 240.0
        step = self._step(
            name, "gpu_slices.trainer_run", [*words, "--", *flags], seconds, environment
        )
        return self._unless_missing(step, [*flags, *run.flags])

    def _flags(self) -> list[str]:
        """Return the flags of all runs of the trainer."""
        return [
            *self._sizes.model, f"--data.path={self._corpus}", "--data.tokenizer=char",
            "--data.holdout=tail", "--data.holdout_fraction=0.01",
            f"--data.cache_dir={self._work / 'data'}",
            "--train.device_batch_size=none", "--train.eval_tokens=2048",
            "--train.sample_tokens=0", "--schedule.warmup_steps=2",
        ]  # fmt: skip

    def _unless_missing(self, step: Step, flags: Sequence[str]) -> Step:
        """Skip a step whose flags this version of the trainer does not have."""
        names = [flag.removeprefix("--").partition("=")[0] for flag in flags]
        known = {*self._machine.trainer_flags, "config"}
        unknown = [name for name in names if name not in known]
        if not unknown:
            return step
        return Step(step.name, (), 0.0, skip=f"the trainer has no --{', --'.join(unknown)}")

    def _peer(self, *, compile_only: bool = False) -> Step:
        name = "compile-torch" if compile_only else "torch"
        python = self._machine.torch_python
        if python is None:
            return Step(name, (), 0.0, skip="no interpreter can import torch; see --torch-python")
        sizes = self._sizes
        words = ["--case=torch-compile", f"--batch={sizes.batch}", f"--steps={sizes.steps}"]
        words += [f"--attention={sizes.attention}", "--sizes", *map(str, sizes.peer)]
        if self._machine.peak_flops is not None:
            words.append(f"--peak-flops={self._machine.peak_flops}")
        words += ["--compile-only"] if compile_only else []
        command = [python, "-m", "gpu_slices.training_peer", *words]
        return Step(name, command, 120.0, self._cache)

    def _attention_benchmark(self) -> Step:
        output = self._keep / "attention.json"
        words = ["tools/bench/attention.py", "--json-lines", f"--output={output}"]
        words += self._sizes.attention_benchmark
        if (python := self._machine.torch_python) is not None:
            words.append(f"--torch-python={python}")
        return Step("attention", [sys.executable, *words], 150.0)

    def _resumes(self) -> list[Step]:
        """Resume with the defaults, and with everything that makes a GPU deterministic."""
        flag = "train.deterministic"
        exact = [f"--{flag}=true"] if flag in self._machine.trainer_flags else []
        xla = "" if exact else "--xla_gpu_deterministic_ops=true"
        found = []
        for name, more, xla_flags in (("deterministic", exact, xla), ("defaults", [], "")):
            if self._sizes.tiny and name == "defaults":
                continue  # the same on a CPU
            words = [f"--folder={self._work / 'resume' / name}", "--"]
            words[1:1] = [f"--steps={self._sizes.resume_steps}"]
            words[1:1] = ["--must-agree"] if name == "deterministic" else []
            batch = f"--train.batch_size={self._sizes.smoke_batch}"
            flags = [*self._flags(), batch, *self._winner.flags, *more]
            environment = {**self._cache, **({"XLA_FLAGS": xla_flags} if xla_flags else {})}
            step = self._step(
                f"resume-{name}", "gpu_slices.resume_check", [*words, *flags], 200.0, environment
            )
            found.append(self._unless_missing(step, flags))
        return found

    def _tune(self) -> Step:
        """Tune the winner's kernel; the Mosaic kernel where the winner has no block sizes."""
        text = " ".join(self._winner.flags)
        name = "triton" if "attention_implementation=triton" in text else "mosaic_gpu"
        words = ["tools/kernels/tune.py", f"--implementation={name}", *self._sizes.tune]
        words.append(f"--output={self._keep / 'tune.json'}")
        return Step(f"tune-{name}", [sys.executable, *words], 150.0, reports=False)


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
    return Run(
        best["case"], best["varied"], best["batch"], best["step_time"]["steps"], best["xla_flags"]
    )
