"""Trainer with NumPy computations, for tests of files, signals, data and exit codes.

Command line, data, run directory, lock, checkpoints, metrics, run manager and exit codes are the
real ones. The training step, the initial state and the evaluation step are NumPy arithmetic and the
plot is text, so that nothing is compiled. The results are functions of the state, the batch and the
learning rate, so that an incorrectly resumed run has other results. The state has the leaves of the
real one.

As a program it takes the arguments of `campaigns.faulty_trainer`.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from campaigns import faulty_trainer

import tjx_metrics
from tjx_trainer.runtime import supervisor
from tjx_trainer.training import train
from tjx_trainer.training.build import Job
from tjx_trainer.training.evaluation import EvalStep
from tjx_trainer.training.train_state import Batch, TrainState


class NumpyJob(Job):
    """Training job whose state has NumPy arrays."""

    def initial_state(self) -> TrainState:
        """Return a state of zeros."""
        state: TrainState = jax.tree.map(np.copy, self.abstract)
        return state

    def eval_params(self, state: TrainState) -> dict[str, Any]:
        """Return the parameters."""
        return state.params


def numpy_job(job: Job) -> NumpyJob:
    """Replace the computations of a job."""
    abstract = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), job.abstract)
    fields: dict[str, Any] = {
        **{field.name: getattr(job, field.name) for field in dataclasses.fields(job)},
        "abstract": abstract,
        "put": dict,
        "train_step": partial(numpy_step, job.config.optimizer.learning_rate),
        "eval_step": EvalStep(_start, _add),
    }
    return NumpyJob(**fields)


def numpy_step(
    learning_rate: float, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, Any]]:
    """Halve each leaf of parameters and optimizer state, and add a number that the batch gives."""
    number = np.float32(_fraction(batch) + learning_rate)
    params, opt_state = jax.tree.map(
        lambda leaf: leaf * leaf.dtype.type(0.5) + number.astype(leaf.dtype),
        (state.params, state.opt_state),
    )
    metrics = {
        "loss": number, "tokens": np.int32(8), "skipped": np.int32(0),
        "skipped_in_a_row": np.int32(0),
    }  # fmt: skip
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


class _Sums(NamedTuple):
    """Sums of an evaluation."""

    loss_sum: float
    tokens: int

    def on_host(self) -> tjx_metrics.Evaluation:
        """Return the evaluation."""
        return tjx_metrics.Evaluation(self.loss_sum, self.tokens, text_bytes=self.tokens)


def _start(_params: Any) -> Any:
    return _Sums(0.0, 0)


def _add(sums: Any, params: Any, batch: Batch) -> Any:
    total = float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(params)))
    return _Sums(sums.loss_sum + total * _fraction(batch), sums.tokens + 10)


def _fraction(batch: Batch) -> float:
    """Return a number from 0 to 1 that depends on every element of a batch."""
    seen = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in batch.values()))
    return int.from_bytes(seen.digest()[:3], "big") / 2**24


def write_plot(_metrics: Path, out: Path) -> None:
    """Write the file of the loss curve."""
    out.write_bytes(b"a picture\n")


def replace_computations(faults: Sequence[str]) -> None:
    """Replace the computations of the trainer; trainers that it supervises get the faults too."""
    build: Callable[..., Job] = vars(train)["build_job"]
    vars(train)["build_job"] = lambda *arguments: numpy_job(build(*arguments))
    vars(tjx_metrics)["plot_loss"] = write_plot
    program = (sys.executable, "-m", "campaigns.numpy_trainer", *faults)
    vars(supervisor)["supervise"] = partial(supervisor.supervise, program=program)


if __name__ == "__main__":
    replace_computations(faulty_trainer.split_words(sys.argv[1:])[0])
    faulty_trainer.run_faulty(sys.argv[1:])
