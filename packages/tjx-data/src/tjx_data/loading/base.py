"""What all loaders have in common: rows by turn make batches by step, a share for each process."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORED_LABEL = -100

RowIndices = npt.NDArray[np.int64]
# Arrays [rows, ...] by name; the names are those of the arguments of a model's losses.
Batch = dict[str, npt.NDArray[Any]]


class Loader(ABC):
    """Batches that are a pure function of (seed, step).

    Rows have numbers, the turns, counted over all epochs: the batch of a step is the rows of the
    turns from step * batch_size on. There is no state to save but the step.

    Parameters
    ----------
    batch_size : int
        Rows in a batch over all processes.
    seed : int
        Decides all that is random; 0 to 2**64 - 1.
    process_index, process_count : int
        This process reads the part process_index of process_count equal parts of each batch, one
        after another: so lie the rows of a batch that is spread over the processes' devices.

    problems : Sequence[str]
        What a subclass found wrong with its own arguments, to be told with the rest.

    Raises
    ------
    ValueError
        With a line for each number that is out of range.
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
            raise ValueError("\n".join(problems))
        self.batch_size, self.seed = batch_size, seed
        self.process_index, self.process_count = process_index, process_count
        self._rows = np.array_split(np.arange(batch_size), process_count)[process_index]

    @abstractmethod
    def rows(self, turns: RowIndices) -> Batch:
        """Return the rows of some turns.

        Parameters
        ----------
        turns : int64 [R], ascending
            Their numbers, over all epochs.

        Returns
        -------
        dict
            Arrays [R, ...]: a row depends on its turn alone.
        """

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, str]:
        """All that decides what a row is, by name: of data, tokenizer and settings.

        The number of processes and the batch size are not part of it: neither changes a row. What
        differs between two identities is what a user is told: names are plain, values short.
        """

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what ``batch(step)`` is."""
        parts = {**self.identity, "batch_size": str(self.batch_size)}
        text = "\n".join(f"{name}={value}" for name, value in sorted(parts.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """Return this process's rows of the batch of a step, [batch_size / process_count, ...].

        Parameters
        ----------
        step : int
            0 is the first.
        """
        assert step >= 0
        return self.rows(step * self.batch_size + self._rows)

    @abstractmethod
    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield the split once, in batches of one shape, always the same.

        Parameters
        ----------
        limit : int, optional
            How much of it, over all processes: tokens of text, or images.

        Yields
        ------
        dict
            As from `rows`. Labels beyond the end are -100; every process gets the same number of
            batches.
        """


def validate_batching(
    batch_size: int, seed: int, process_index: int, process_count: int
) -> list[str]:
    """Return a line for each number that is out of range."""
    problems = []
    if batch_size < 1:
        problems.append(f"batch_size={batch_size}: a batch needs at least 1 row")
    if not 0 <= seed < 2**64:
        problems.append(f"seed={seed}: choose a number from 0 to 2**64 - 1")
    if process_count < 1 or batch_size % process_count:
        problems.append(
            f"batch_size={batch_size} cannot be shared equally by process_count={process_count}; "
            "choose a multiple of it"
        )
    if not 0 <= process_index < process_count:
        problems.append(f"process_index={process_index}: choose 0 to {process_count - 1}")
    return problems
