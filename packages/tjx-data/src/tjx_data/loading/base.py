"""Loader base class: batches as a pure function of (seed, step), divided among processes."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Required, TypedDict

import numpy as np
import numpy.typing as npt

from tjx_core import ConfigError

IGNORED_LABEL = -100
"""Label of positions that the loss ignores."""

RowIndices = npt.NDArray[np.int64]
# Arrays [rows, ...] by name; the names are the argument names of the models' losses.
Batch = dict[str, npt.NDArray[Any]]


class Batching(TypedDict, total=False):
    """Arguments of all loaders; see `Loader`."""

    batch_size: Required[int]
    seed: int
    process_index: int
    process_count: int


class Loader(ABC):
    """Base class of loaders whose batches are a pure function of (seed, step).

    Rows are numbered over all epochs. The batch of a step holds the rows ``step * batch_size`` to
    ``(step + 1) * batch_size - 1``. The step is the only state to save.

    Parameters
    ----------
    batch_size : int
        Rows in a batch over all processes.
    seed : int
        Seed of all randomness, 0 to 2**64 - 1.
    process_index, process_count : int
        This process reads the contiguous slice `process_index` of `process_count` equal slices of
        each batch, the order in which a batch is sharded over the processes' devices.
    problems : sequence of str
        Problems that a subclass found in its own arguments, reported with those found here.

    Raises
    ------
    ValueError
        With one line for each invalid argument.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        problems: Sequence[str] = (),
    ) -> None:
        problems = [*problems, *validate_batching(batch_size, seed, process_index, process_count)]
        if problems:
            raise ConfigError(problems)
        self.batch_size, self.seed = batch_size, seed
        self.process_index, self.process_count = process_index, process_count
        self._local_rows = np.array_split(np.arange(batch_size), process_count)[process_index]

    @abstractmethod
    def rows(self, row_indices: RowIndices) -> Batch:
        """Return rows by index.

        Parameters
        ----------
        row_indices : int64 [R], ascending
            Indices of the rows, counted over all epochs.

        Returns
        -------
        dict
            Arrays [R, ...]. Each row depends on its own index only.
        """

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, str]:
        """Everything that determines the content of a row, by name: data, tokenizer, settings.

        Batch size and number of processes are excluded, since they do not change rows. Error
        messages show the entries that differ, so names are readable and values short.
        """

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines ``batch(step)``."""
        parts = {**self.identity, "batch_size": str(self.batch_size)}
        text = "\n".join(f"{name}={value}" for name, value in sorted(parts.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """Return this process's rows of a batch.

        Parameters
        ----------
        step : int
            Training step, from 0.

        Returns
        -------
        dict
            Arrays [batch_size / process_count, ...].
        """
        assert step >= 0
        return self.rows(step * self.batch_size + self._local_rows)

    @abstractmethod
    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield the split once, in deterministic batches of one shape.

        Parameters
        ----------
        limit : int, optional
            Most units to yield over all processes: tokens of text, or images.

        Yields
        ------
        dict
            As `rows` returns. Rows beyond the end have labels of -100, so that every process gets
            the same number of batches.
        """


def validate_batching(
    batch_size: int, seed: int, process_index: int, process_count: int
) -> list[str]:
    """Return one line for each invalid argument of a loader's batches."""
    problems = []
    if batch_size < 1:
        problems.append(f"batch_size: got {batch_size}; expected at least 1")
    if not 0 <= seed < 2**64:
        problems.append(f"seed: got {seed}; expected a number from 0 to 2**64 - 1")
    if process_count < 1 or batch_size % process_count:
        problems.append(
            f"batch_size: got {batch_size}; expected a multiple of process_count={process_count}"
        )
    if not 0 <= process_index < process_count:
        problems.append(f"process_index: got {process_index}; expected 0 to {process_count - 1}")
    return problems
