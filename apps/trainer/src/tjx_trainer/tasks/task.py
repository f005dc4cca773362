"""What a family of models is trained on: its batches, and what is said about the result.

Whatever is in a batch are arguments of the model's `losses` by name, so that the training step is
the same for all tasks.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

import tjx_data
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.training.gradients import Batch

HostBatch = Mapping[str, np.ndarray]
PutBatch = Callable[[HostBatch], Batch]


class DataShard(NamedTuple):
    """The part of the data that this process reads.

    Attributes
    ----------
    batch_size, evaluation_batch_size : int
        Examples in a batch over all processes.
    process_index, process_count : int
        Which process this is, and of how many.
    """

    batch_size: int
    evaluation_batch_size: int
    process_index: int
    process_count: int


@runtime_checkable
class Task(Protocol):
    """Data, and how a model is judged by them.

    Attributes
    ----------
    accuracies : tuple of int
        Evaluations count how often the right answer is among so many likeliest.
    token_byte_lengths : int32 [vocab_size] or None
        Bytes of text that each token stands for; None where labels are no text.
    """

    accuracies: tuple[int, ...]
    token_byte_lengths: np.ndarray | None

    @property
    def folders(self) -> Mapping[str, Path]:
        """Where prepared data lie, by corpus."""

    @property
    def train_data(self) -> tjx_data.Loader:
        """The rows that are trained on."""

    @property
    def data_summary(self) -> str:
        """What is trained on, in a line."""

    def batch(self, step: int, put: PutBatch) -> Batch:
        """Return the batch of a step, on the devices: a function of (seed, step)."""

    def evaluation_batches(self, put: PutBatch) -> Iterator[Batch]:
        """Yield held-out batches on the devices; the label -100 counts nothing."""

    def sample(self, params: dict[str, Any], /) -> str | None:
        """Let the model write something; None where it is to write nothing."""

    def record(self, run: RunDirectory) -> None:
        """Write to the run directory what is needed to use the model."""

    def final_report(self, params: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Say what came out of the run, in lines."""


def data_identity(task: Task) -> dict[str, str]:
    """Return all that decides the batches of a run, by name; a checkpoint goes with it."""
    data = task.train_data
    return {**data.identity, "batch_size": str(data.batch_size), "data": data.fingerprint}


OpenedTask = tuple[Config, Callable[[DataShard], Task]]
