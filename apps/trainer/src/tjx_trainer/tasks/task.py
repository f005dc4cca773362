"""`Task` protocol: the data of a run and the report of its final evaluation.

A batch of `train_data` holds the arguments of the model's `losses` method by name, so the train
step is the same for all tasks. `Job.complete_batch` makes the batches of other tasks from their
rows.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

import tjx_data
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.training.train_state import Batch

HostBatch = Mapping[str, np.ndarray]
PutBatch = Callable[[HostBatch], Batch]


class DataShard(NamedTuple):
    """The rows of each batch that this process reads.

    Attributes
    ----------
    batch_size, evaluation_batch_size : int
        Examples per batch over all processes.
    process_index, process_count : int
        Index of this process, and the number of processes.
    """

    batch_size: int
    evaluation_batch_size: int
    process_index: int
    process_count: int


@runtime_checkable
class Task(Protocol):
    """Data loaders of a run and the report of its final evaluation.

    Attributes
    ----------
    accuracies : tuple of int
        Values of k for top-k accuracy in evaluations.
    token_byte_lengths : int32 [vocab_size] or None
        Length of each token's text [bytes]; None if labels are not text tokens.
    """

    accuracies: tuple[int, ...]
    token_byte_lengths: np.ndarray | None

    @property
    def folders(self) -> Mapping[str, Path]:
        """Folders of prepared data, by corpus."""

    @property
    def train_data(self) -> tjx_data.Loader:
        """Loader of the training split."""

    @property
    def data_summary(self) -> str:
        """One-line description of the training data."""

    def evaluation_batches(self, put: PutBatch) -> Iterator[Batch]:
        """Yield validation batches on the devices; labels of -100 are ignored."""

    def sample(self, params: dict[str, Any], /) -> str | None:
        """Generate a text sample; None if the task generates none."""

    def record(self, run: RunDirectory) -> None:
        """Write the files that the trained model needs, such as its tokenizer."""

    def final_report(self, params: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Return the final metrics and samples as lines."""


@runtime_checkable
class ResponseEvaluator(Protocol):
    """A task that evaluates generated responses besides the validation loss."""

    def evaluate_responses(self, params: dict[str, Any], /) -> Mapping[str, float]:
        """Answer held-out prompts and return metrics by name, such as the accuracy."""


@runtime_checkable
class CorpusEvaluator(Protocol):
    """A task that evaluates each corpus of a mixture besides the mixture."""

    def evaluation_batches_by_corpus(self, put: PutBatch) -> Iterator[tuple[str, Batch]]:
        """Yield validation batches with the name of their corpus, one corpus after another."""


def data_identity(task: Task) -> dict[str, str]:
    """Return everything that determines the batches of a run, by name; saved with checkpoints."""
    data = task.train_data
    return {**data.identity, "batch_size": str(data.batch_size), "data": data.fingerprint}


OpenedTask = tuple[Config, Callable[[DataShard], Task]]
