"""Mixture of several corpora in one stream of batches, in fixed proportions."""

import heapq
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from itertools import islice

import numpy as np
import numpy.typing as npt

from tjx_core import ConfigError
from tjx_data.loading.base import IGNORED_LABEL, Batch, Loader, RowIndices

MAX_PERIOD = 100_000
"""Rows after which a schedule repeats at the latest."""

ArrayLayout = dict[str, tuple[tuple[int, ...], np.dtype]]


class MixtureLoader(Loader):
    """Rows of several loaders, interleaved in the proportions of their weights.

    The schedule is deterministic and periodic (see `mixture_schedule`): after any number of rows,
    the rows of each corpus differ from its exact share by less than one. The rows of a corpus come
    in its loader's own order, so that each corpus has its own epochs.

    Parameters
    ----------
    loaders : Mapping[str, Loader]
        Loaders by corpus name, each made with ``process_count=1``: the mixture divides the rows
        among processes. Their batch sizes are ignored.
    weights : Mapping[str, float]
        A weight above 0 for each name; they need not add up to 1. Their decimal representation is
        taken as exact: 0.3 and 0.7 are 3 and 7 rows of 10. Periods longer than 100,000 rows are
        rounded to 100,000.
    batch_size, process_index, process_count
        As of `Loader`. There is no seed, since the schedule is not random.

    Raises
    ------
    ValueError
        If names or weights do not match, an argument is invalid, or the loaders differ in
        tokenizer, row length, or names, shapes and dtypes of their arrays.
    """

    def __init__(
        self,
        loaders: Mapping[str, Loader],
        weights: Mapping[str, int | float],
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        super().__init__(
            batch_size=batch_size, process_index=process_index, process_count=process_count
        )
        if problems := [*_validate_weights(loaders, weights), *_validate_loaders(loaders)]:
            raise ConfigError(problems)
        self.loaders = {name: loaders[name] for name in sorted(loaders)}
        self.seq_len: int | None = getattr(next(iter(self.loaders.values())), "seq_len", None)
        counts = rows_per_period({name: weights[name] for name in self.loaders})
        self.counts = dict(zip(self.loaders, counts, strict=True))
        self.period = sum(counts)
        self._schedule = mixture_schedule(counts)  # [period], indices of loaders
        self._row_of_corpus = np.empty(self.period, np.int64)  # number within corpus and period
        for corpus, count in enumerate(counts):
            self._row_of_corpus[self._schedule == corpus] = np.arange(count)
        self._layout = self._common_layout()

    @property
    def identity(self) -> Mapping[str, str]:
        """Identity entries of each corpus's loader, prefixed with its name, and its share."""
        found: dict[str, str] = {}
        for name, loader in self.loaders.items():
            found |= {f"{name}/{key}": value for key, value in loader.identity.items()}
            found[f"{name}/share"] = f"{self.counts[name]} of {self.period}"
            if "tokenizer" in loader.identity:
                found["tokenizer"] = loader.identity["tokenizer"]
        return found

    def rows(self, row_indices: RowIndices) -> Batch:
        """Return rows by index, each from the corpus that the schedule assigns to it.

        Parameters
        ----------
        row_indices : int64 [R], ascending
            Indices of the mixture.

        Returns
        -------
        dict
            Arrays [R, ...], as the loaders of the corpora return.
        """
        periods, positions = np.divmod(row_indices, self.period)
        corpora, within = self._schedule[positions], self._row_of_corpus[positions]
        found = {
            key: np.empty((len(row_indices), *shape), dtype)
            for key, (shape, dtype) in self._layout.items()
        }
        for corpus, (name, loader) in enumerate(self.loaders.items()):
            mine = np.flatnonzero(corpora == corpus)
            if not len(mine):
                continue
            rows = loader.rows(periods[mine] * self.counts[name] + within[mine])
            assert _layout_of(rows) == self._layout, f"{name} changed the layout of its rows"
            for key, array in rows.items():
                found[key][mine] = array
        return found

    def rows_by_corpus(self, row_index: int) -> dict[str, int]:
        """Count the rows of each corpus before a row of the mixture.

        Parameters
        ----------
        row_index : int
            Row of the mixture, counted over all epochs.

        Returns
        -------
        dict of str to int
            Number of rows by corpus; their sum is `row_index`.
        """
        periods, position = divmod(row_index, self.period)
        inside = np.bincount(self._schedule[:position], minlength=len(self.counts)).tolist()
        return {
            name: periods * count + extra
            for (name, count), extra in zip(self.counts.items(), inside, strict=True)
        }

    def epochs_by_corpus(self, row_index: int) -> dict[str, float]:
        """Return the epochs of each corpus that were completed before a row of the mixture.

        Corpora whose loader has no ``rows_per_epoch`` are left out.

        Parameters
        ----------
        row_index : int
            Row of the mixture, counted over all epochs.

        Returns
        -------
        dict of str to float
            Completed epochs by corpus.
        """
        sizes = {name: getattr(self.loaders[name], "rows_per_epoch", None) for name in self.counts}
        return {
            name: n_rows / size
            for name, n_rows in self.rows_by_corpus(row_index).items()
            if (size := sizes[name])
        }

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield held-out rows of all corpora in the proportions of the mixture.

        The mean loss over them is the loss of the mixture. Iteration ends when the next corpus of
        the schedule has no more rows, since other rows would change the proportions.

        Parameters
        ----------
        limit : int, optional
            End with the row that reaches this number of labels, over all processes.

        Yields
        ------
        dict
            As `batch` returns. Rows beyond the end repeat the last row with labels of -100; every
            process gets the same number of batches.
        """
        yield from self._local_batches(self._mixed_evaluation_rows(limit))

    def evaluation_batches_by_corpus(self, limit: int | None = None) -> Iterator[tuple[str, Batch]]:
        """Yield all held-out rows of one corpus after another, each batch with its corpus name.

        Parameters
        ----------
        limit : int, optional
            Limit for each corpus, in the unit of its loader.

        Yields
        ------
        name, batch : str, dict
            Name of the corpus, and a batch of its held-out rows.
        """
        for name, loader in self.loaders.items():
            for batch in self._local_batches(_evaluation_rows(loader, limit)):
                yield name, batch

    def _mixed_evaluation_rows(self, limit: int | None) -> Iterator[Batch]:
        streams = [_evaluation_rows(loader, None) for loader in self.loaders.values()]
        n_labels, row_index = 0, 0
        while limit is None or n_labels < limit:
            row = next(streams[self._schedule[row_index % self.period]], None)
            if row is None:
                return
            n_labels += int(np.count_nonzero(row["labels"] != IGNORED_LABEL))
            yield row
            row_index += 1

    def _local_batches(self, rows: Iterator[Batch]) -> Iterator[Batch]:
        """Collect rows [1, ...] in batches of one shape and yield this process's slice of each."""
        while batch := list(islice(rows, self.batch_size)):
            padding = {**batch[-1], "labels": np.full_like(batch[-1]["labels"], IGNORED_LABEL)}
            batch += [padding] * (self.batch_size - len(batch))
            size = self.batch_size // self.process_count
            local = batch[self.process_index * size : (self.process_index + 1) * size]
            yield {key: np.concatenate([row[key] for row in local]) for key in padding}

    def _common_layout(self) -> ArrayLayout:
        layouts = {
            name: _layout_of(loader.rows(np.zeros(1, np.int64)))
            for name, loader in self.loaders.items()
        }
        (first, common), *others = layouts.items()
        problems = [
            f"loaders: got rows of {name!r} with {_format_layout(layout)}; expected those of "
            f"{first!r}, {_format_layout(common)}; give loaders with the same settings"
            for name, layout in others
            if layout != common
        ]
        if problems:
            raise ConfigError(problems)
        return common


def _evaluation_rows(loader: Loader, limit: int | None) -> Iterator[Batch]:
    """Yield a loader's held-out rows [1, ...], those without a label left out."""
    for batch in loader.evaluation_batches(limit):
        labels = batch["labels"]
        has_label = (labels != IGNORED_LABEL).reshape(len(labels), -1).any(axis=1)
        for row in np.flatnonzero(has_label):
            yield {key: array[row : row + 1] for key, array in batch.items()}


def _layout_of(rows: Batch) -> ArrayLayout:
    return {key: (array.shape[1:], array.dtype) for key, array in rows.items()}


def _format_layout(layout: ArrayLayout) -> str:
    arrays = sorted(layout.items())
    return ", ".join(f"{key} {dtype}{list(shape)}" for key, (shape, dtype) in arrays)


def _validate_weights(
    loaders: Mapping[str, Loader], weights: Mapping[str, int | float]
) -> Iterator[str]:
    if not loaders:
        yield "loaders: got none; expected at least one"
    for name in loaders.keys() - weights.keys():
        yield f"weights: got none for {name!r}; expected a number above 0"
    for name in weights.keys() - loaders.keys():
        yield f"weights: got {name!r}; expected names of loaders: {', '.join(sorted(loaders))}"
    for name, weight in weights.items():
        if not (weight > 0 and math.isfinite(weight)):
            yield (
                f"weights: got {name}={weight}; expected a finite number above 0; leave the corpus "
                "out instead"
            )


def _validate_loaders(loaders: Mapping[str, Loader]) -> Iterator[str]:
    for name, loader in loaders.items():
        if loader.process_count != 1:
            yield (
                f"loaders: got {name!r} with process_count={loader.process_count}; expected 1: the "
                "mixture divides the rows among processes"
            )
    settings = {
        "seq_len": {name: getattr(loader, "seq_len", None) for name, loader in loaders.items()},
        "tokenizer": {name: loader.identity.get("tokenizer") for name, loader in loaders.items()},
    }
    for setting, values in settings.items():
        known = [(name, value) for name, value in values.items() if value is not None]
        for name, value in known[1:]:
            first, expected = known[0]
            if value != expected:
                yield (
                    f"loaders: got {name!r} with {setting} {str(value)[:16]}; expected that of "
                    f"{first!r}, {str(expected)[:16]}"
                )


def rows_per_period(weights: Mapping[str, int | float]) -> list[int]:
    """Convert weights to whole numbers of rows per period.

    The numbers are exact if their sum is at most `MAX_PERIOD`. Otherwise they are rounded to that
    sum by the largest-remainder method.

    Parameters
    ----------
    weights : mapping
        Weight above 0 of each corpus; their decimal representation is taken as exact.

    Returns
    -------
    list of int
        Rows of each corpus, in the order of `weights`.

    Raises
    ------
    ValueError
        If rounding leaves a corpus without a row.

    Examples
    --------
    >>> rows_per_period({"books": 0.3, "code": 0.6, "web": 0.1})
    [3, 6, 1]
    """
    exact = [Fraction(Decimal(str(float(weight)))) for weight in weights.values()]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    counts = [math.floor(share * MAX_PERIOD) for share in shares]
    remainders = [share * MAX_PERIOD - count for share, count in zip(shares, counts, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda i: -remainders[i])
    for i in by_remainder[: MAX_PERIOD - sum(counts)]:
        counts[i] += 1
    if absent := [name for name, count in zip(weights, counts, strict=True) if count == 0]:
        raise ValueError(
            f"weights: got less than one row of {MAX_PERIOD:,} for {', '.join(absent)}; give a "
            "larger weight, or leave the corpus out"
        )
    return counts


def mixture_schedule(counts: list[int]) -> npt.NDArray[np.int64]:
    """Interleave corpora so that no corpus's row count deviates from its share by a full row.

    Tijdeman 1980, "The chairman assignment problem" (Discrete Mathematics 32): for k corpora a
    schedule exists that never deviates by more than 1 - 1 / (2k - 2) rows. This bound gives an
    earliest and a latest position for each row of each corpus. Filling each position with the
    available row of the earliest deadline finds a schedule whenever one exists.

    Parameters
    ----------
    counts : list of int
        Rows per period of each corpus, above 0.

    Returns
    -------
    int64 [sum of counts]
        Index of the corpus of each row of the period.

    Examples
    --------
    >>> mixture_schedule([3, 1]).tolist()
    [0, 0, 1, 0]
    """
    period, parts = sum(counts), max(2 * len(counts) - 2, 2)
    released: list[list[tuple[int, int]]] = [[] for _ in range(period)]
    for corpus, count in enumerate(counts):
        for k in range(count):  # row k of the corpus is between these positions, both included
            earliest = -(-(parts * k + 1) * period // (parts * count)) - 1
            latest = (parts * (k + 1) - 1) * period // (parts * count)
            released[earliest].append((latest, corpus))
    schedule = np.empty(period, np.int64)
    available: list[tuple[int, int]] = []
    for position, rows in enumerate(released):
        for row in rows:
            heapq.heappush(available, row)
        latest, schedule[position] = heapq.heappop(available)
        assert latest >= position
    return schedule
