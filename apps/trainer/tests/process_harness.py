"""Harness for runs with faults injected at a chosen step: signals, full disks, bad values."""

import contextlib
import dataclasses
import errno
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import tjx_ckpt
import tjx_ckpt.checkpointer
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.runtime.signals import SignalHandler, StopSignal
from tjx_trainer.runtime.watchdog import Watchdog
from tjx_trainer.training.build import Job
from tjx_trainer.training.train import run_job
from tjx_trainer.training.train_state import Batch, TrainState

OF_THE_CLOCK = ("train/tokens_per_sec", "train/hours", "time/", "memory/", "compile/")


def run_attempt(job: Job, path: Path) -> int:
    """Resume or start a run; return the exit code."""
    path.mkdir(exist_ok=True)
    with SignalHandler() as signal_handler:
        try:
            return run_job(job, RunDirectory(path), signal_handler)
        except StopSignal as stopped:
            return 128 + stopped.signal


@contextlib.contextmanager
def at(phase: str, step: int, happen: Callable[[], object], *, nth: int = 1) -> Iterator[None]:
    """Call `happen` at the n-th start of a phase at a step; fail if it is never reached."""
    beat, seen = Watchdog.beat, 0

    def beat_and_more(self: Watchdog, now: str, made: int) -> None:
        nonlocal seen
        beat(self, now, made)
        if (now, made) == (phase, step):
            seen += 1
            if seen == nth:
                happen()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watchdog, "beat", beat_and_more)
        yield
    assert seen >= nth, f"the run never came to {phase} of step {step}"


def send(*numbers: int) -> Callable[[], None]:
    def raise_all() -> None:
        for number in numbers:
            signal.raise_signal(number)

    return raise_all


def lines(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(OF_THE_CLOCK)} for line in found]


def records(path: Path) -> list[dict[str, Any]]:
    """Return all that was recorded and is no matter of the clock."""
    return [
        line for line in lines(path) if not any(name.startswith("checkpoint/") for name in line)
    ]


def assert_each_stands_once(path: Path) -> None:
    names = [(line["step"], name) for line in lines(path) for name in line if name != "step"]
    assert len(names) == len(set(names))


def steps(path: Path) -> list[int]:
    return tjx_ckpt.list_steps(path / "checkpoints")


def final_state(job: Job, path: Path) -> list[bytes]:
    with tjx_ckpt.Checkpointer(path / "checkpoints") as checkpointer:
        state = checkpointer.restore(job.abstract, step=12)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(state))]


def assert_alike(job: Job, path: Path, whole: Path) -> None:
    """A run ended as one to which nothing happened: in every bit, and in every record."""
    assert final_state(job, path) == final_state(job, whole)
    assert records(path) == records(whole)
    assert_each_stands_once(path)


def with_fault(job: Job, bad: set[int], *, times: int) -> Job:
    """Return the job on a machine whose gradients are not finite in some steps."""
    left = dict.fromkeys(bad, times)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        step = int(jax.device_get(state.step)) + 1
        if not left.get(step):
            return job.train_step(state, batch)
        left[step] -= 1
        with jax.transfer_guard("allow"):
            kept = jax.tree.map(lambda leaf: leaf.copy(), (state.params, state.opt_state))
            scale = state.params["ln_f"]["scale"].at[3].set(np.nan)
        poisoned = {**state.params, "ln_f": {**state.params["ln_f"], "scale": scale}}
        state, metrics = job.train_step(state._replace(params=poisoned), batch)
        return state._replace(params=kept[0], opt_state=kept[1]), metrics

    return dataclasses.replace(job, train_step=train_step)


def before_write(patch: pytest.MonkeyPatch, happen: Callable[[int], object]) -> None:
    """Let something happen, of the step, in the thread that is about to write a checkpoint."""
    module: Any = tjx_ckpt.checkpointer
    write: Callable[..., int] = module.write_checkpoint

    def write_later(storage: Any, draft: Any, *, name: str) -> int:
        happen(draft.step)
        return write(storage, draft, name=name)

    patch.setattr(module, "write_checkpoint", write_later)


def fill_disk(patch: pytest.MonkeyPatch, bad: int) -> None:
    """Let the save of a step fail as on a disk without space."""

    def fail(step: int) -> None:
        if step == bad:
            raise OSError(errno.ENOSPC, "No space left on device")

    before_write(patch, fail)
