"""Trainer, evaluation and export with trivial computations, for tests of file operations.

`numpy_trainer` lists which parts of the trainer are real. Here the data are prepared once too, so
that a run takes a tenth of a second.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from campaigns.numpy_trainer import numpy_job, numpy_step, write_plot
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

STEPS = 6
_FLAGS = {
    **TINY, "model.n_layer": 1, "model.d_model": 8, "model.max_seq_len": 16, "data.seq_len": 16,
    "train.max_steps": STEPS, "train.eval_every": 3, "checkpoint.every": 2, "checkpoint.keep": 2,
}  # fmt: skip


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
        self._job = numpy_job(build_job(*open_task(resolve(_words(flags)))))
        revision, versions = provenance.git_revision(), provenance.versions()
        mock.patch.multiple(
            provenance, git_revision=lambda: revision, versions=lambda: versions
        ).start()
        mock.patch.object(train, "prepare", self._prepare).start()
        mock.patch.object(tjx_metrics, "plot_loss", write_plot).start()
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
        step = partial(numpy_step, config.optimizer.learning_rate)
        return dataclasses.replace(self._job, config=resolved, train_step=step)

    def _evaluate(self, arguments: Any) -> int:
        model = load_model.load_model(arguments.model)
        digest_leaves(model.params)
        return 0


def _words(flags: Flags) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]
