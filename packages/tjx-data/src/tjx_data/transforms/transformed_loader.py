"""Loaders that transform the rows of another loader."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence

from tjx_data.loading.base import Batch, Loader, RowIndices
from tjx_data.loading.mixture import MixtureLoader


class TransformedLoader(Loader):
    """Base class of loaders that transform the rows of another loader.

    Parameters
    ----------
    loader : Loader
        Source of the rows. Its batch size and processes apply to the transformed rows.
    seed : int or None
        Seed of the transformation; None uses the seed of `loader`.
    problems : sequence of str
        As of `Loader`.
    """

    def __init__(self, loader: Loader, *, seed: int | None, problems: Sequence[str]) -> None:
        super().__init__(
            batch_size=loader.batch_size,
            seed=loader.seed if seed is None else seed,
            process_index=loader.process_index,
            process_count=loader.process_count,
            problems=problems,
        )
        self.loader = loader

    def rows(self, row_indices: RowIndices) -> Batch:
        """Return transformed rows by index; `transform` describes the arrays."""
        return self.transform(self.loader.rows(row_indices), row_indices)

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield the split once, transformed in the same way on every pass.

        Parameters
        ----------
        limit : int, optional
            Most tokens of source text to read, over all processes.
        """
        for number, batch in enumerate(self.loader.evaluation_batches(limit)):
            yield self.transform(batch, number * self.batch_size + self._local_rows)

    def evaluation_batches_by_corpus(self, limit: int | None = None) -> Iterator[tuple[str, Batch]]:
        """Yield the split by corpus of a mixture, transformed in the same way on every pass.

        Parameters
        ----------
        limit : int, optional
            Most tokens of source text to read of each corpus.

        Yields
        ------
        name, batch : str, dict
            As of the mixture; nothing if the source is not one.
        """
        if not isinstance(self.loader, MixtureLoader):
            return
        n_seen: Counter[str] = Counter()
        for name, batch in self.loader.evaluation_batches_by_corpus(limit):
            yield name, self.transform(batch, n_seen[name] * self.batch_size + self._local_rows)
            n_seen[name] += 1

    @abstractmethod
    def transform(self, batch: Batch, row_indices: RowIndices) -> Batch:
        """Return transformed rows; the randomness of a row depends on seed and row index only."""
