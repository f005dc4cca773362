"""A tiny run of the real trainer in a process of its own: started, watched, hit, ended.

Dropout, accumulation and a text that is read several times over are on, so that whatever a resumed
run forgets changes its numbers.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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

# What a run imports, for `ForkServer`.
TRAINER_MODULES = (
    "tjx_trainer.training.train",
    "tjx_metrics.plotting.curves",
    "campaigns.faulty_trainer",
)

# A net under every wait: only a run that hangs needs it.
DEADLINE_SECONDS = 180.0


class TooLateError(AssertionError):
    """What was waited for did not come; the message holds what the process printed."""


class Life:
    """One process of a run, from its start to its end.

    Parameters
    ----------
    run
        The run of the trainer that the process executes.
    environment
        All variables of the process.
    """

    def __init__(self, run: "TinyRun", environment: Mapping[str, str]) -> None:
        number = len(list(run.folder.glob("printed-*.txt")))
        self._printed = run.folder / f"printed-{number}.txt"
        self.process: subprocess.Popen[bytes] | ForkedProcess
        # The output goes to a file: a full pipe would stop the process.
        with self._printed.open("xb") as file:
            if run.server and not run.prefix:
                self.process = run.server.start(
                    run.arguments, environment, run.folder, self._printed
                )
            else:
                self.process = subprocess.Popen(
                    [*run.prefix, sys.executable, "-m", *run.arguments],
                    env=dict(environment),
                    cwd=run.folder,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )

    @property
    def printed(self) -> str:
        """What the process has printed so far."""
        return self._printed.read_text(errors="replace")

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait for something that the process does.

        Raises
        ------
        TooLateError
            If the process ends first, or the deadline passes.
        """
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not happened():
            if self.process.poll() is not None:
                # It may have come just before the end.
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
        """Send a signal to this process alone."""
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
    """A run of the trainer in a folder of its own.

    Attributes
    ----------
    folder
        Holds the run directory ``run``, and what each process printed.
    environment
        All variables of its processes; see `clean_environment`.
    flags
        The trainer's, without leading dashes; ``data.path`` among them.
    module
        The Python program that the flags are given to, with words that come before them.
    prefix
        Programs that start it: such as one that limits what it may use.
    root
        Where this process sees the root of the run's file system.
    server
        Starts the processes without a prefix; None: each process imports its modules itself.
    """

    folder: Path
    environment: Mapping[str, str]
    flags: Flags
    module: tuple[str, ...] = ("tjx_trainer.main",)
    prefix: tuple[str, ...] = ()
    root: Path = Path("/")
    server: ForkServer | None = None

    @property
    def run_dir(self) -> Path:
        """The run directory, as this process sees it."""
        return self.root / self.folder.relative_to("/") / "run"

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return self.run_dir / "checkpoints"

    @property
    def arguments(self) -> list[str]:
        """The arguments of ``python -m`` that start or resume the run."""
        flags = {**self.flags, "run_dir": self.folder / "run"}
        words = (word for name, value in flags.items() for word in (f"--{name}", str(value)))
        return [*self.module, *words]

    def start(self, **variables: str) -> Life:
        """Start the run, or go on with it, with more environment variables."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return Life(self, {**self.environment, **variables})

    def finish(self, expected: int = 0, **variables: str) -> str:
        """Start the run, or go on with it, and wait for its end; return what it printed.

        Raises
        ------
        AssertionError
            If the exit code is another than expected; holds what the process printed.
        """
        life = self.start(**variables)
        code = life.wait()
        if code != expected:
            raise AssertionError(f"ended with {code} instead of {expected}:\n{life.printed}")
        return life.printed

    def elsewhere(self, folder: Path, **flags: str | int | float) -> "TinyRun":
        """Return the same run in another folder, with other flags; ``_`` stands for ``.``."""
        return replace(self, folder=folder, flags={**self.flags, **_dotted(flags)})

    def with_fault(self, fault: str, at: int) -> "TinyRun":
        """Return this run with a fault more, of `campaigns.faulty_trainer`, at a step."""
        faulty = ("campaigns.faulty_trainer",)
        return replace(
            self, module=(*(self.module if len(self.module) > 1 else faulty), fault, str(at))
        )

    def open_gates(self, *steps: int) -> None:
        """Let a run with the fault ``gates`` make these steps, before which it waits."""
        for step in steps:
            (self.folder / f"gate-{step}").touch()

    def reached(self, step: int) -> bool:
        """Tell whether a step is recorded, which comes one step late."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return False
        return any(line.startswith(f'{{"step": {step},') for line in lines)

    def saved(self) -> list[int]:
        """Return the steps of the checkpoints that are there, ascending."""
        if not self.checkpoints.is_dir():
            return []
        names = [path.name for path in self.checkpoints.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def heartbeat(self) -> dict[str, Any]:
        """Return what the heartbeat file says; nothing before there is one."""
        try:
            beat: dict[str, Any] = json.loads((self.run_dir / "heartbeat.json").read_text())
        except FileNotFoundError:
            return {}
        return beat

    def unfinished(self) -> list[str]:
        """Return the names of saves under way, or of what a killed one left."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(path.name for path in self.checkpoints.iterdir() if path.suffix == ".tmp")


def _dotted(flags: Flags) -> Flags:
    """Turn ``train_max_steps`` into ``train.max_steps``."""
    return {name.replace("_", ".", 1): value for name, value in flags.items()}


def clean_environment(home: Path) -> dict[str, str]:
    """Return variables for runs: this interpreter's modules, an empty home, one compilation cache.

    The cache lies in the home, so that of several processes only the first compiles.
    """
    # The last two are how tests compile quickly.
    names = ("PATH", "LANG", "JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    # Absolute, since runs start in folders of their own.
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
    """Write a rhyme to learn, with lines of many lengths: no place in a row is like another."""
    rhyme = (f"{n % 10} and {'over ' * (n % 7)}the wall they run\n" for n in range(lines))
    path.write_text("".join(rhyme))


def write_documents(path: Path, *, count: int) -> None:
    """Write a rhyme in many documents of many lengths, to be packed."""
    texts = (f"{n % 10} and {'over ' * (n % 7)}the wall they run" for n in range(count))
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
