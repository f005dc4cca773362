"""What a family of models is trained on: its batches, and what is said about the result.

A task is found by the model's family. Whatever is in a batch are arguments of the model's `losses`
by name, so that the training step is the same for all.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

import tjx_data
from tjx_trainer.config import Config, is_reversal
from tjx_trainer.run_dir import RunDirectory
from tjx_trainer.step import Batch

HostBatch = Mapping[str, np.ndarray]
Put = Callable[[HostBatch], Batch]


class Share(NamedTuple):
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
    def introduction(self) -> str:
        """What is trained on, in a line."""

    def batch(self, step: int, put: Put) -> Batch:
        """Return the batch of a step, on the devices: a function of (seed, step)."""

    def evaluation_batches(self, put: Put) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield held-out batches on the devices, and their labels here; -100 counts nothing."""

    def record(self, run: RunDirectory) -> None:
        """Write to the run directory what is needed to use the model."""

    def conclusion(self, params: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Say what came out of the run, in lines."""


def data_identity(task: Task) -> dict[str, str]:
    """Return all that decides the batches of a run, by name; a checkpoint goes with it."""
    data = task.train_data
    return {**data.identity, "batch_size": str(data.batch_size), "data": data.fingerprint}


Opened = tuple[Config, Callable[[Share], Task]]


def open_task(config: Config, progress: tjx_data.Progress | None = None) -> Opened:
    """Open the data of a run.

    Parameters
    ----------
    config : Config
        From the command line.
    progress : callable, optional
        Told how far preparing goes.

    Returns
    -------
    tuple
        The configuration with what the data decide (sizes of vocabulary and classes), and a
        function that makes the task.

    Raises
    ------
    tjx_data.HubError
        If the corpus or tokenizer is neither in the cache nor within reach.
    ValueError
        If the data cannot be used.
    """
    # One family's data must not load what another's need.
    from tjx_trainer import image_task, masked_task, reversal_task, span_task, text_task

    openers: dict[str, Callable[..., Opened]] = {
        "gpt": text_task.open_language_modelling,
        "bert": masked_task.open_masked_language_modelling,
        "vit": image_task.open_image_classification,
        "encoder_decoder": span_task.open_span_corruption,
    }
    if is_reversal(config.data, config.model):
        return reversal_task.open_reversal(config, progress)
    return openers[config.model.family](config, progress)
