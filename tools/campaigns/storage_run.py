"""Trainer, evaluation and export with trivial computations, for tests of file operations.

Command line, run directory, lock, checkpoints, metrics, run manager and exit codes are the real
ones. Only the training step and the evaluation are replaced by NumPy arithmetic, so that nothing is
compiled and a run takes a tenth of a second. They are functions of state, batch and learning rate,
so that an incorrectly resumed run has other results.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from campaigns.outcome import digest_leaves, numbers
from campaigns.tiny_run import TINY, Flags, write_text

import tjx_ckpt
import tjx_metrics
from tjx_ckpt.store import retry
from tjx_eval import load_model
from tjx_eval import main as eval_program
from tjx_eval.commands import loss
from tjx_trainer import main as program
from tjx_trainer import run_reader
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.runtime import provenance
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.training import train
from tjx_trainer.training.build import Job, build_job
from tjx_trainer.training.train_state import Batch, TrainState

STEPS = 6
_FLAGS = {
    **TINY, "model.n_layer": 1, "model.d_model": 8, "model.max_seq_len": 16, "data.seq_len": 16,
    "train.max_steps": STEPS, "train.eval_every": 3, "checkpoint.every": 2, "checkpoint.keep": 2,
}  # fmt: skip


class StorageJob(Job):
    """Training job with NumPy computations."""

    def initial_state(self) -> TrainState:
        """Return a state of zeros."""
        state: TrainState = jax.tree.map(np.copy, self.abstract)
        return state

    def eval_params(self, state: TrainState) -> dict[str, Any]:
        """Return the parameters."""
        return state.params

    def put(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Keep the batch on the host."""
        on_host: Any = batch
        placed: Batch = dict(on_host)
        return placed

    def evaluate(
        self, params: dict[str, Any], before_batch: Callable[[], None] = lambda: None
    ) -> tjx_metrics.Evaluation:
        """Return the sum of the parameters."""
        before_batch()
        total = float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(params)))
        return tjx_metrics.Evaluation(loss_sum=total, tokens=10, text_bytes=10)


def _step(
    learning_rate: float, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, Any]]:
    seen = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in batch.values()))
    number = np.float32(int.from_bytes(seen.digest()[:3], "big") / 2**24 + learning_rate)
    params, opt_state = jax.tree.map(
        lambda leaf: leaf * leaf.dtype.type(0.5) + number.astype(leaf.dtype),
        (state.params, state.opt_state),
    )
    metrics = {
        "loss": number, "tokens": np.int32(8), "skipped": np.int32(0),
        "skipped_in_a_row": np.int32(0),
    }  # fmt: skip
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


class StorageRun:
    """Run the trainer's programs on one job; forked children share its prepared data.

    Parameters
    ----------
    folder
        Folder of the data.
    """

    def __init__(self, folder: Path) -> None:
        write_text(folder / "rhyme.txt", lines=200)
        flags = {
            **_FLAGS, "data.path": str(folder / "rhyme.txt"),
            "data.cache_dir": str(folder / "cache"),
        }  # fmt: skip
        self._flags: Flags = flags
        real = build_job(*open_task(resolve(_words(flags))))
        abstract = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), real.abstract)
        fields = {field.name: getattr(real, field.name) for field in dataclasses.fields(real)}
        self._job = StorageJob(**{**fields, "abstract": abstract})
        revision, versions = provenance.git_revision(), provenance.versions()
        mock.patch.multiple(
            provenance, git_revision=lambda: revision, versions=lambda: versions
        ).start()
        mock.patch.object(train, "prepare", self._prepare).start()
        mock.patch.object(tjx_metrics, "plot_loss", _plot).start()
        mock.patch.object(retry, "PAUSES_S", (0.0, 0.0, 0.0)).start()
        mock.patch.object(run_reader, "make_update_rule", return_value=(None, None)).start()
        mock.patch.object(run_reader, "abstract_state", return_value=self._job.abstract).start()
        mock.patch.object(loss, "run", self._evaluate).start()

    def train(self, path: Path, more: Flags) -> int:
        """Train in a run directory; return the exit code."""
        return program.main(_words({**self._flags, "run_dir": str(path), **more}))

    def evaluate(self, path: Path) -> int:
        """Open the newest checkpoint as `tjx-eval loss` does; return the exit code."""
        return eval_program.main(["loss", str(path)])

    def export(self, path: Path, out: Path) -> int:
        """Export the newest checkpoint; return the exit code."""
        return eval_program.main(["export", str(path), str(out)])

    def outcome(self, path: Path) -> dict[str, Any]:
        """Return the deterministic results of a run as JSON."""
        with tjx_ckpt.Checkpointer(path / "checkpoints") as checkpointer:
            steps = checkpointer.steps()
            state = checkpointer.restore(self._job.abstract, step=steps[-1])
            sound = [step for step in steps if not checkpointer.verify(step)]
        found = {f"{step} {name}": value for (step, name), value in numbers(path).items()}
        return {"leaves": digest_leaves(state), "numbers": found, "steps": steps, "sound": sound}

    def _prepare(self, config: Any) -> Job:
        model: Any = self._job.config.model
        resolved = config.with_vocabulary(model.vocab_size)
        step = partial(_step, config.optimizer.learning_rate)
        return dataclasses.replace(self._job, config=resolved, train_step=step)

    def _evaluate(self, arguments: Any) -> int:
        model = load_model.load_model(arguments.model)
        digest_leaves(model.params)
        return 0


def _words(flags: Flags) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def _plot(_metrics: Path, out: Path) -> None:
    out.write_bytes(b"a picture\n")
