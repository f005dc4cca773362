"""Mixture of several corpora in one stream of batches, in exact proportions."""

import math
from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
import numpy.typing as npt

from tjx_core import ConfigError
from tjx_data.loading.base import IGNORED_LABEL, Batch, Loader, RowIndices
from tjx_data.mixtures.mixture_weights import Weights, mixture_schedule, rows_per_period

ArrayLayout = dict[str, tuple[tuple[int, ...], np.dtype]]


class MixtureLoader(Loader):
    """Rows of several loaders, interleaved in the proportions of their weights.

    The schedule is deterministic and periodic (see `mixture_schedule`): after any number of rows,
    the rows of each corpus differ from its exact share by less than one. The rows of a corpus come
    in its loader's own order, so that each corpus has its own epochs. Weights may change at given
    steps (a curriculum); the rows of a corpus continue then, and the step is still the only state.

    Parameters
    ----------
    loaders : Mapping[str, Loader]
        Loaders by corpus name, each made with ``process_count=1``: the mixture divides the rows
        among processes. Their batch sizes are ignored.
    weights : Mapping[str, float]
        A weight above 0 for each name; they need not add up to 1. Their decimal representation is
        taken as exact: 0.3 and 0.7 are 3 and 7 rows of 10. Periods longer than 100,000 rows are
        rounded to 100,000.
    changes : Mapping[int, Mapping[str, float]], optional
        Other weights by the step from which they hold. Corpora without a weight are not read;
        each must have one at some step. Evaluation has the proportions of the last weights.
    batch_size, process_index, process_count
        As of `Loader`. There is no seed, since the schedule is not random.

    Raises
    ------
    ValueError
        If names or weights do not match, an argument is invalid, or the loaders differ in
        tokenizer, row length, or names, shapes and dtypes of their arrays.

    Examples
    --------
    >>> from tjx_data import TokenLoader
    >>> settings = {"vocab_size": 9, "seq_len": 4, "batch_size": 1}
    >>> loaders = {
    ...     name: TokenLoader.from_tokens(np.full(40, i), **settings)
    ...     for i, name in enumerate(("web", "books"))
    ... }
    >>> mixture = MixtureLoader(
    ...     loaders, {"web": 3, "books": 1}, changes={2: {"books": 1}}, batch_size=4
    ... )
    >>> [mixture.batch(step)["tokens"][:, 0].tolist() for step in (1, 2)]
    [[0, 1, 0, 0], [1, 1, 1, 1]]
    """

    def __init__(
        self,
        loaders: Mapping[str, Loader],
        weights: Weights,
        *,
        changes: Mapping[int, Weights] | None = None,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        super().__init__(
            batch_size=batch_size, process_index=process_index, process_count=process_count
        )
        by_step = {0: weights, **(changes or {})}
        if problems := [*_validate_weights(loaders, by_step), *_validate_loaders(loaders)]:
            raise ConfigError(problems)
        self.loaders = {name: loaders[name] for name in sorted(loaders)}
        self.seq_len: int | None = getattr(next(iter(self.loaders.values())), "seq_len", None)
        self._phases: list[_Phase] = []
        for step in sorted(by_step):
            first = step * batch_size
            before = self._phases[-1].count_rows(first) if self._phases else 0
            self._phases.append(_Phase(first, before, list(self.loaders), by_step[step]))
        self._starts = np.array([phase.first for phase in self._phases])
        self._layout = self._common_layout()

    @property
    def identity(self) -> Mapping[str, str]:
        """Identity entries of each corpus's loader, prefixed with its name, and its shares."""
        found: dict[str, str] = {}
        for corpus, (name, loader) in enumerate(self.loaders.items()):
            found |= {f"{name}/{key}": value for key, value in loader.identity.items()}
            found[f"{name}/share"] = "; ".join(phase.share(corpus) for phase in self._phases)
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
        corpora, corpus_rows = np.empty_like(row_indices), np.empty_like(row_indices)
        phases = np.searchsorted(self._starts, row_indices, side="right") - 1
        for number in np.unique(phases):
            mine = phases == number
            corpora[mine], corpus_rows[mine] = self._phases[number].locate(row_indices[mine])
        found = {
            key: np.empty((len(row_indices), *shape), dtype)
            for key, (shape, dtype) in self._layout.items()
        }
        for corpus, (name, loader) in enumerate(self.loaders.items()):
            mine = np.flatnonzero(corpora == corpus)
            if not len(mine):
                continue
            rows = loader.rows(corpus_rows[mine])
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
        phase = self._phases[np.searchsorted(self._starts, row_index, side="right") - 1]
        return dict(zip(self.loaders, phase.count_rows(row_index).tolist(), strict=True))

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
        sizes = {name: getattr(each, "rows_per_epoch", None) for name, each in self.loaders.items()}
        return {
            name: n_rows / size
            for name, n_rows in self.rows_by_corpus(row_index).items()
            if (size := sizes[name])
        }

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield held-out rows of all corpora in the proportions of the mixture's last weights.

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
        schedule = self._phases[-1].schedule
        n_labels, row_index = 0, 0
        while limit is None or n_labels < limit:
            row = next(streams[schedule[row_index % len(schedule)]], None)
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


class _Phase:
    """Rows of a mixture from `first` until the weights change.

    Parameters
    ----------
    first : int
        First row.
    before : int or int64 [corpora]
        Rows of each corpus before it.
    names : list of str
        The corpora.
    weights : mapping
        Weights of some of them.
    """

    def __init__(
        self, first: int, before: int | npt.NDArray[np.int64], names: list[str], weights: Weights
    ) -> None:
        self.first = first
        present = np.array([i for i, name in enumerate(names) if name in weights])
        counts = rows_per_period({names[i]: weights[names[i]] for i in present})
        self.schedule = present[mixture_schedule(counts)]  # [period], indices of corpora
        self._counts = np.zeros(len(names), np.int64)
        self._counts[present] = counts
        self._before = np.zeros(len(names), np.int64) + before
        self._row_of_corpus = np.empty(len(self.schedule), np.int64)  # within corpus and period
        for corpus, count in zip(present, counts, strict=True):
            self._row_of_corpus[self.schedule == corpus] = np.arange(count)

    def share(self, corpus: int) -> str:
        """Return the rows per period of a corpus, and the first row if it is not 0."""
        begin = f"from row {self.first} " if self.first else ""
        return f"{begin}{self._counts[corpus]} of {len(self.schedule)}"

    def locate(self, rows: RowIndices) -> tuple[RowIndices, RowIndices]:
        """Return the corpus of each row of the mixture, and the row of that corpus."""
        periods, positions = np.divmod(rows - self.first, len(self.schedule))
        corpora = self.schedule[positions]
        within = periods * self._counts[corpora] + self._row_of_corpus[positions]
        return corpora, self._before[corpora] + within

    def count_rows(self, row: int) -> npt.NDArray[np.int64]:
        """Count the rows of each corpus before a row of the mixture, int64 [corpora]."""
        periods, position = divmod(row - self.first, len(self.schedule))
        inside = np.bincount(self.schedule[:position], minlength=len(self._counts))
        return self._before + periods * self._counts + inside


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
    loaders: Mapping[str, Loader], by_step: Mapping[int, Weights]
) -> Iterator[str]:
    if not loaders:
        yield "loaders: got none; expected at least one"
    for name in loaders.keys() - {name for weights in by_step.values() for name in weights}:
        yield f"weights: got none for {name!r}; expected a number above 0"
    for step, weights in by_step.items():
        if step < 0 or not weights:
            yield f"changes: got {dict(weights)} at step {step}; expected weights, a step above 0"
        setting = "weights" if step == 0 else f"changes at step {step}"
        for name in weights.keys() - loaders.keys():
            expected = ", ".join(sorted(loaders))
            yield f"{setting}: got {name!r}; expected names of loaders: {expected}"
        for name, weight in weights.items():
            if not (weight > 0 and math.isfinite(weight)):
                yield (
                    f"{setting}: got {name}={weight}; expected a finite number above 0; leave the "
                    "corpus out instead"
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
