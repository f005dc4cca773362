"""Runs of a job in this process, to a step or to the end."""

from pathlib import Path

import jax
import numpy as np
import pytest

import tjx_ckpt
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.runtime.signals import SignalHandler
from tjx_trainer.runtime.watchdog import Watchdog
from tjx_trainer.training.build import Job
from tjx_trainer.training.train import run_job


def life(job: Job, path: Path, *, end: int | None = None) -> int:
    """Train to the end, or until a stop signal before a step."""
    path.mkdir(exist_ok=True)
    beat = Watchdog.beat
    with SignalHandler() as signal_handler, pytest.MonkeyPatch.context() as patch:

        def stop_there(self: Watchdog, phase: str, step: int) -> None:
            if (phase, step) == ("train", (end or 0) - 1):
                signal_handler.stop = 15
            beat(self, phase, step)

        patch.setattr(Watchdog, "beat", stop_there)
        return run_job(job, RunDirectory(path), signal_handler)


def last_state(job: Job, path: Path, step: int) -> dict[str, bytes]:
    """Return the bytes of each leaf of a saved state."""
    with tjx_ckpt.Checkpointer(path / "checkpoints") as checkpointer:
        state = checkpointer.restore(job.abstract, step=step)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(key): np.asarray(leaf).tobytes() for key, leaf in leaves}
