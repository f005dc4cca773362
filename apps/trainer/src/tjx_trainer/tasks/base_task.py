"""Base classes of tasks whose batches come from tjx_data loaders."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import tjx_data
from tjx_data.transforms.transformed_loader import TransformedLoader
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.tasks.task import DataShard, PutBatch
from tjx_trainer.tasks.text_data import TextData
from tjx_trainer.training.train_state import Batch


class LoaderTask[L: tjx_data.Loader](ABC):
    """Base class of tasks whose batches come from two loaders.

    Parameters
    ----------
    train_data, validation_data : Loader
        Loaders of the two splits.
    eval_limit : int or None
        Largest amount of validation data per evaluation, in the unit of its loader; None for all.
    folders : Mapping[str, Path]
        Folders of prepared data, by corpus.
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
        """One-line description of the training data."""

    def evaluation_batches(self, put: PutBatch) -> Iterator[Batch]:
        """Yield validation batches on the devices, up to `eval_limit`."""
        return map(put, self.validation_data.evaluation_batches(self.eval_limit))

    def evaluation_batches_by_corpus(self, put: PutBatch) -> Iterator[tuple[str, Batch]]:
        """Yield validation batches by corpus of a mixture; `eval_limit` is divided among them."""
        data, limit = self.validation_data, self.eval_limit
        if not isinstance(data, tjx_data.MixtureLoader | TransformedLoader):
            return
        if limit is not None:
            limit = max(limit // max(len(self.folders), 1), 1)
        for name, batch in data.evaluation_batches_by_corpus(limit):
            yield name, put(batch)

    def sample(self, params: dict[str, Any], /) -> str | None:  # noqa: ARG002  for subclasses
        """Return None: by default a task generates no samples."""
        return None

    def record(self, run: RunDirectory) -> None:  # noqa: B027  optional
        """Write nothing by default."""

    @abstractmethod
    def final_report(self, params: dict[str, Any], metrics: Mapping[str, float], /) -> list[str]:
        """Return the final metrics and samples as lines."""


class TextTask[L: tjx_data.Loader](LoaderTask[L]):
    """Base class of text tasks; the tokenizer is saved with the run.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    text : TextData
        The prepared text.
    share : DataShard
        The rows of this process.
    open_split : callable
        From (config, text, share, split) to the loader of a split.
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
        """Write the tokenizer to the run directory."""
        self.tokenizer.save(run.tokenizer)


def make_loaders[L: tjx_data.Loader](
    open_split: Callable[..., L], seed: int, share: DataShard
) -> tuple[L, L]:
    """Return the train and validation loaders of this process's rows."""

    def loader(split: str, batch_size: int) -> L:
        return open_split(
            split=split,
            batch_size=batch_size,
            seed=seed,
            process_index=share.process_index,
            process_count=share.process_count,
        )

    return loader("train", share.batch_size), loader("validation", share.evaluation_batch_size)
