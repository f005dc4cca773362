"""Commands, environments and time limits of the processes of the slices."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_slices.runner import Step
from gpu_slices.sizes import Sizes

TESTS = "packages/tjx-kernels/tests/test_kernels_on_gpu.py"
DETERMINISTIC = "train.deterministic"
# Several processes share the GPU.
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclass(frozen=True)
class Machine:
    """Hardware and software of this machine; see `gpu_slices.probe`.

    Attributes
    ----------
    implementations
        Attention implementations for GPUs in the order of the tjx_kernels table; the value is why
        one does not support training here, or None.
    trainer_flags
        Names of the flags of the trainer.
    peak_flops
        FLOP/s in bfloat16; None if unknown.
    torch_python
        Python interpreter with torch, or None.
    processes
        Maximum number of parallel compile processes.
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
        Name of the case.
    flags
        Flags of the trainer in addition to those of all runs.
    batch, steps
        Sequences per step, and number of steps.
    xla_flags
        Flags of XLA.
    """

    name: str
    flags: Sequence[str]
    batch: int
    steps: int
    xla_flags: str = ""


class Programs:
    """Builds the steps of the slices.

    Parameters
    ----------
    sizes : Sizes
        Sizes for a GPU or for a rehearsal.
    machine : Machine
        Hardware and software of the machine.
    work : Path
        Folder for files that are not archived.
    keep : Path
        Folder for files to archive.
    compiled : str
        Name of the compilation cache folder; processes with the same name share it.
    """

    def __init__(
        self, sizes: Sizes, machine: Machine, *, work: Path, keep: Path, compiled: str = "compiled"
    ) -> None:
        self.sizes, self.machine = sizes, machine
        self._work, self._keep = work, keep
        self._text = work / f"corpus-{sizes.vocabulary}.txt"
        self._cache = {
            "JAX_COMPILATION_CACHE_DIR": str(work / compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        }

    def corpus(self) -> Step:
        """Write the text that the trainer reads."""
        sizes = self.sizes
        words = [str(self._text), f"--vocabulary={sizes.vocabulary}", f"--tokens={sizes.tokens}"]
        return _module("corpus", "corpus", words, 60.0)

    def checks(self, suite: str) -> list[Step]:
        """Compare each attention implementation with float64; `suite` is "smoke" or "rest"."""
        tiny = ["--tiny"] if self.sizes.tiny else []
        return [
            _module(
                f"check-{name}",
                "attention_check",
                [f"--implementation={name}", f"--cases={suite}", *tiny],
                90.0,
                SHARED,
            )
            for name in self.machine.implementations
        ]

    def tests(self) -> list[Step]:
        """Run the kernel tests on the GPU, one process per implementation."""
        words = ["-p", "gpu_slices.pytest_cases", "-p", "no:faulthandler", "-m", "gpu"]
        words += ["-W", "default", "--tb=short", TESTS]
        environment = dict(SHARED)
        if not self.sizes.tiny:
            # Override the shared test settings, which select the CPU and fast compilation.
            environment |= {"JAX_PLATFORMS": "cuda,cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
        command = [sys.executable, "-m", "pytest", *words]
        return [
            Step(f"tests-{name}", [*command, "-k", f"{name} or served"], 200.0, environment)
            for name in list(self.machine.implementations)[: 1 if self.sizes.tiny else None]
        ]

    def train(self, run: Run, *, compile_only: bool = False, seconds: float = 90.0) -> Step:
        """Run and measure the trainer, or only compile its step."""
        name = f"compile-{run.name}" if compile_only else f"trainer-{run.name}"
        flags = self._flags()
        words = [f"--case={run.name}", f"--folder={self._work / 'runs'}", f"--keep={self._keep}"]
        words += [f"--batch={run.batch}", f"--steps={run.steps}"]
        words += [f"--varied={flag}" for flag in run.flags]
        words.append("--compile-only" if compile_only else "--profile")
        environment = dict(self._cache)
        if run.xla_flags:
            environment["XLA_FLAGS"] = run.xla_flags
        if compile_only:
            environment |= SHARED
            seconds = 240.0
        step = _module(name, "trainer_run", [*words, "--", *flags], seconds, environment)
        return self._unless_missing(step, [*flags, *run.flags])

    def peer(self, *, compile_only: bool = False) -> Step:
        """Measure the training step of the same model in torch."""
        name = "compile-torch" if compile_only else "torch"
        python, sizes = self.machine.torch_python, self.sizes
        if python is None:
            return Step(name, (), 0.0, skip="no interpreter has torch; see --torch-python")
        words = ["--case=torch-compile", f"--batch={sizes.batch}", f"--steps={sizes.steps}"]
        words += [f"--attention={sizes.attention}", "--sizes", *map(str, sizes.peer)]
        if self.machine.peak_flops is not None:
            words.append(f"--peak-flops={self.machine.peak_flops}")
        words += ["--compile-only"] if compile_only else []
        command = [python, "-m", "gpu_slices.training_peer", *words]
        return Step(name, command, 120.0, self._cache)

    def attention_benchmark(self) -> Step:
        """Benchmark attention against JAX and torch."""
        output = self._keep / "attention.json"
        words = ["tools/bench/attention.py", "--json-lines", f"--output={output}"]
        words += self.sizes.attention_benchmark
        if (python := self.machine.torch_python) is not None:
            words.append(f"--torch-python={python}")
        return Step("attention", [sys.executable, *words], 150.0)

    def head_loss(self) -> Step:
        """Time the head loss over chunk sizes."""
        return _module("head_loss", "head_loss", self.sizes.head_loss, 90.0)

    def resume(self, winner: Run, *, deterministic: bool) -> Step:
        """Compare a resumed and a repeated run with the first one, bit for bit.

        With `deterministic`, the run sets the deterministic flag, and a difference is a failure.
        """
        name = "deterministic" if deterministic else "defaults"
        words = [f"--folder={self._work / 'resume' / name}", f"--steps={self.sizes.resume_steps}"]
        flags = [*self._flags(), f"--train.batch_size={self.sizes.smoke_batch}", *winner.flags]
        environment = dict(self._cache)
        if deterministic:
            words.append("--must-agree")
            if DETERMINISTIC in self.machine.trainer_flags:
                flags.append(f"--{DETERMINISTIC}=true")
            else:
                environment["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true"
        words += ["--", *flags]
        step = _module(f"resume-{name}", "resume_check", words, 200.0, environment)
        return self._unless_missing(step, flags)

    def tune(self, winner: Run) -> Step:
        """Tune the kernel of the winner, or the Mosaic kernel if the winner has no block sizes."""
        text = " ".join(winner.flags)
        name = "triton" if "attention_implementation=triton" in text else "mosaic_gpu"
        words = ["tools/kernels/tune.py", f"--implementation={name}", *self.sizes.tune]
        words.append(f"--output={self._keep / 'tune.json'}")
        return Step(f"tune-{name}", [sys.executable, *words], 150.0, reports=False)

    def _flags(self) -> list[str]:
        """Return the flags of all runs of the trainer."""
        return [
            *self.sizes.model, f"--data.path={self._text}", "--data.tokenizer=char",
            "--data.holdout=tail", "--data.holdout_fraction=0.01",
            f"--data.cache_dir={self._work / 'data'}",
            "--train.device_batch_size=none", "--train.eval_tokens=2048",
            "--train.sample_tokens=0", "--schedule.warmup_steps=2",
        ]  # fmt: skip

    def _unless_missing(self, step: Step, flags: Sequence[str]) -> Step:
        """Skip a step whose flags this version of the trainer does not have."""
        names = [flag.removeprefix("--").partition("=")[0] for flag in flags]
        known = {*self.machine.trainer_flags, "config"}
        unknown = [name for name in names if name not in known]
        if not unknown:
            return step
        return Step(step.name, (), 0.0, skip=f"the trainer has no --{', --'.join(unknown)}")


def _module(
    name: str,
    module: str,
    arguments: Sequence[str],
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Step:
    command = [sys.executable, "-m", f"gpu_slices.{module}", *arguments]
    return Step(name, command, seconds, environment or {})
