"""Tiny run of the real trainer in a separate process, for fault tests.

Dropout, gradient accumulation and several epochs are enabled, so that any state that resuming loses
changes the results.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from campaigns.fork_server import ForkedProcess, ForkServer

Flags = Mapping[str, str | int | float]

TINY: Flags = {
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.d_model": 32,
    "model.max_seq_len": 32,
    "model.dropout": 0.1,
    "data.seq_len": 32,
    "data.tokenizer": "char",
    "data.holdout": "tail",
    "train.max_steps": 60,
    "train.batch_size": 8,
    "train.accumulation": 2,
    "train.eval_every": 25,
    "train.sample_tokens": 0,
    "optimizer.learning_rate": 3e-3,
    "schedule.warmup_steps": 5,
    "checkpoint.every": 10,
    "log.every": 1,
}

# Modules of a run, imported by `ForkServer`.
TRAINER_MODULES = (
    "tjx_trainer.training.train",
    "tjx_metrics.plotting.curves",
    "campaigns.faulty_trainer",
    "campaigns.numpy_trainer",
)
# Programs with the trainer's arguments; the last two take faults before them.
TRAINER = "tjx_trainer.main"
NUMPY_TRAINER = "campaigns.numpy_trainer"
_FAULTY_TRAINER = "campaigns.faulty_trainer"

# Timeout of every wait; only a hanging run reaches it.
DEADLINE_SECONDS = 180.0


class TooLateError(AssertionError):
    """A wait timed out; the message contains the output of the process."""


class RunProcess:
    """One process of a run.

    Parameters
    ----------
    run
        The run that the process executes.
    environment
        All variables of the process.
    """

    def __init__(self, run: "TinyRun", environment: Mapping[str, str]) -> None:
        number = len(list(run.folder.glob("printed-*.txt")))
        self._printed = run.folder / f"printed-{number}.txt"
        self.process: subprocess.Popen[bytes] | ForkedProcess
        # Output goes to a file, since a full pipe would block the process.
        with self._printed.open("xb") as file:
            if run.server:
                self.process = run.server.start(
                    run.arguments, environment, run.folder, self._printed,
                    neighbour=run.neighbour, limits=run.limits,
                )  # fmt: skip
            else:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", *run.arguments],
                    env=dict(environment),
                    cwd=run.folder,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )

    @property
    def printed(self) -> str:
        """Output of the process so far."""
        return self._printed.read_text(errors="replace")

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait until a condition on the process holds.

        Raises
        ------
        TooLateError
            If the process ends first, or the deadline passes.
        """
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not happened():
            if self.process.poll() is not None:
                # The condition may have become true just before the end.
                if happened():
                    return
                raise TooLateError(
                    f"ended with {self.process.returncode} before {what}:\n{self.printed}"
                )
            if time.monotonic() > deadline:
                self.kill()
                raise TooLateError(f"no {what} in {DEADLINE_SECONDS:g} s:\n{self.printed}")
            time.sleep(0.001)

    def wait_for_text(self, text: str) -> None:
        """Wait until the process prints something."""
        self.wait_until(lambda: text in self.printed, repr(text))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process only."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end; return the exit code, or minus the signal that ended it.

        Raises
        ------
        TooLateError
            If the deadline passes.
        """
        try:
            return self.process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TooLateError(f"did not end:\n{self.printed}") from None

    def kill(self) -> None:
        """End the process by kill -9 if it still runs, and wait until it is gone."""
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True, kw_only=True)
class TinyRun:
    """Run of the trainer in a separate folder.

    Attributes
    ----------
    folder
        Contains the run directory ``run`` and the output of each process.
    environment
        All variables of its processes; see `clean_environment`.
    flags
        Flags of the trainer without dashes, including ``data.path``.
    module
        Python module to run, with arguments that precede the flags.
    root
        Path at which this process sees the root of the run's file system.
    server
        Fork server; None starts new interpreters.
    neighbour, limits
        Namespaces and resource limits of processes of the server; see `ForkServer.start`.
    """

    folder: Path
    environment: Mapping[str, str]
    flags: Flags
    module: tuple[str, ...] = (TRAINER,)
    root: Path = Path("/")
    server: ForkServer | None = None
    neighbour: int | None = None
    limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        """Path of the run directory for this process."""
        return self.root / self.folder.relative_to("/") / "run"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.run_dir / "checkpoints"

    @property
    def arguments(self) -> list[str]:
        """The arguments of ``python -m`` that start or resume the run."""
        flags = {**self.flags, "run_dir": self.folder / "run"}
        words = (word for name, value in flags.items() for word in (f"--{name}", str(value)))
        return [*self.module, *words]

    def start(self, **variables: str) -> RunProcess:
        """Start or resume the run, with additional environment variables."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return RunProcess(self, {**self.environment, **variables})

    def finish(self, expected: int = 0, **variables: str) -> str:
        """Start or resume the run and wait for its end; return its output.

        Raises
        ------
        AssertionError
            If the exit code differs; the message contains the output.
        """
        life = self.start(**variables)
        code = life.wait()
        if code != expected:
            raise AssertionError(f"ended with {code} instead of {expected}:\n{life.printed}")
        return life.printed

    def elsewhere(self, folder: Path, **flags: str | int | float) -> "TinyRun":
        """Return the same run in another folder with other flags; ``_`` is replaced by ``.``."""
        return replace(self, folder=folder, flags={**self.flags, **_dotted(flags)})

    def with_fault(self, fault: str, at: int) -> "TinyRun":
        """Return this run with an additional fault of `campaigns.faulty_trainer` at a step."""
        module = self.module if self.module[0] != TRAINER else (_FAULTY_TRAINER,)
        return replace(self, module=(*module, fault, str(at)))

    def open_gates(self, *steps: int | str) -> None:
        """Let a run with the fault ``gates`` proceed to these steps."""
        for step in steps:
            (self.folder / f"gate-{step}").touch()

    def at_gate(self, step: int) -> bool:
        """Return whether a run with the fault ``gates`` waits, or waited, before a step."""
        return (self.folder / f"at-gate-{step}").exists()

    def saved(self) -> list[int]:
        """Return the steps of the existing checkpoints, ascending."""
        if not self.checkpoints.is_dir():
            return []
        names = [path.name for path in self.checkpoints.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def heartbeat(self) -> dict[str, Any]:
        """Return the content of the heartbeat file, empty before it exists."""
        try:
            beat: dict[str, Any] = json.loads((self.run_dir / "heartbeat.json").read_text())
        except FileNotFoundError:
            return {}
        return beat

    def unfinished(self) -> list[str]:
        """Return the names of unfinished saves, also of killed processes."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(path.name for path in self.checkpoints.iterdir() if path.suffix == ".tmp")


def _dotted(flags: Flags) -> Flags:
    """Turn ``train_max_steps`` into ``train.max_steps``."""
    return {name.replace("_", ".", 1): value for name, value in flags.items()}


def clean_environment(home: Path) -> dict[str, str]:
    """Return environment variables of runs: module path, empty home, shared compilation cache.

    The cache is in the home folder, so that only the first process compiles.
    """
    # The last two reduce compile time.
    names = ("PATH", "LANG", "JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    # Absolute, since runs start in other folders.
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    return {
        **kept,
        "HOME": str(home),
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def write_text(path: Path, *, lines: int) -> None:
    """Write a rhyme with lines of different lengths as training text."""
    rhyme = (f"{n % 10} and {'over ' * (n % 7)}the wall they run\n" for n in range(lines))
    path.write_text("".join(rhyme))


def write_documents(path: Path, *, count: int, word: str = "wall") -> None:
    """Write a rhyme as documents of different lengths, for packing."""
    texts = (f"{n % 10} and {'over ' * (n % 7)}the {word} they run" for n in range(count))
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
