"""Data that a loader gives as a model's losses want them: what such tasks have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import tjx_data
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.tasks.task import DataShard, PutBatch
from tjx_trainer.tasks.text_data import TextData
from tjx_trainer.training.gradients import Batch


class LoaderTask[L: tjx_data.Loader](ABC):
    """A task whose batches are its loaders'.

    Parameters
    ----------
    train_data, validation_data : Loader
        What to train on, and what is held out.
    eval_limit : int or None
        How much of the latter is looked at, as its loader counts; None is all.
    folders : Mapping[str, Path]
        Where prepared data lie, by corpus.
    """

    accuracies: tuple[int, ...] = (1,)
    token_byte_lengths: np.ndarray | None = None

    def __init__(
        self,
        train_data: L,
        validation_data: L,
        *,
        eval_limit: int | None,
        folders: Mapping[str, Path] | None = None,
    ) -> None:
        self.train_data: L = train_data
        self.validation_data: L = validation_data
        self.eval_limit = eval_limit
        self.folders: Mapping[str, Path] = folders or {}

    @property
    @abstractmethod
    def data_summary(self) -> str:
        """What is trained on, in a line."""

    def batch(self, step: int, put: PutBatch) -> Batch:
        """Return the batch of a step."""
        return put(self.train_data.batch(step))

    def evaluation_batches(self, put: PutBatch) -> Iterator[Batch]:
        """Yield the held-out data, or as much as was asked for."""
        return map(put, self.validation_data.evaluation_batches(self.eval_limit))

    def sample(self, params: dict[str, Any], /) -> str | None:  # noqa: ARG002  not all write
        """Return nothing, unless a task's models write."""
        return None

    def record(self, run: RunDirectory) -> None:  # noqa: B027  there may be nothing to keep
        """Keep what is needed to use the model; nothing, unless a task says otherwise."""

    @abstractmethod
    def final_report(self, params: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Say what came out of the run, in lines."""


class TextTask[L: tjx_data.Loader](LoaderTask[L]):
    """A task on text: whatever is made of it, the tokenizer stays with the run.

    Parameters
    ----------
    config : Config
        Resolved.
    text : Text
        The prepared text.
    share : Share
        This process's rows.
    open_split : callable
        Makes the loader of a split: of (config, text, share, split).
    """

    def __init__(
        self, config: Config, text: TextData, share: DataShard, open_split: Callable[..., L]
    ) -> None:
        super().__init__(
            open_split(config, text, share, "train"),
            open_split(config, text, share, "validation"),
            eval_limit=config.train.eval_tokens,
            folders=text.folders,
        )
        self.config, self.tokenizer = config, text.tokenizer

    def record(self, run: RunDirectory) -> None:
        """Keep the tokenizer with the run."""
        self.tokenizer.save(run.tokenizer)


def make_loaders[L: tjx_data.Loader](
    open_split: Callable[..., L], seed: int, share: DataShard
) -> tuple[L, L]:
    """Return the loaders of train and validation, each of this process's rows."""

    def loader(split: str, batch_size: int) -> L:
        return open_split(
            split=split,
            batch_size=batch_size,
            seed=seed,
            process_index=share.process_index,
            process_count=share.process_count,
        )

    return loader("train", share.batch_size), loader("validation", share.evaluation_batch_size)
