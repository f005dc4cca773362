"""Several corpora in one stream, each with its share: which one comes is a function of the turn."""

import heapq
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from itertools import islice

import numpy as np
import numpy.typing as npt

from tjx_data.loading.base import IGNORED_LABEL, Batch, Loader, RowIndices

MAX_PERIOD = 100_000


class MixtureLoader(Loader):
    """Rows of several loaders, in the proportions of their weights.

    The weights become whole numbers of rows of a period, after which the choice of the corpora
    begins again. There is no chance in it: after any number of turns, the rows from each corpus
    differ from its exact share by less than one. The next row from a corpus is its loader's next
    turn, so that each goes through its own epochs at its own pace.

    Parameters
    ----------
    loaders : Mapping[str, Loader]
        By name. They give the rows that they are asked for; the rows are shared among processes
        here, so that each is made with ``process_count=1`` (its batch size does not matter).
    weights : Mapping[str, float]
        A number above 0 for each name; they need not add up to 1. Their decimals are taken at
        their word: the weights 0.3 and 0.7 are exactly 3 and 7 rows of 10. Where the period
        would be longer than 100,000 rows it is 100,000, and the shares are rounded to that.
    batch_size, process_index, process_count
        As of `Loader`. There is no seed: what is random is up to the loaders.

    Raises
    ------
    ValueError
        If names or weights are wrong; if loaders differ in tokenizer, row length, or names, shapes
        and types of their arrays; or if a number is out of range.
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
        if problems := [*_wrong_weights(loaders, weights), *_differences(loaders)]:
            raise ValueError("\n".join(problems))
        self.loaders = {name: loaders[name] for name in sorted(loaders)}
        self.seq_len: int | None = getattr(next(iter(self.loaders.values())), "seq_len", None)
        counts = rows_per_period({name: weights[name] for name in self.loaders})
        self.counts = dict(zip(self.loaders, counts, strict=True))
        self.period = sum(counts)
        self._chosen = mixture_schedule(counts)  # [period], the number of a loader
        self._before = np.empty(self.period, np.int64)  # how often it came before in the period
        for number, count in enumerate(counts):
            self._before[self._chosen == number] = np.arange(count)
        self._layout = self._common_layout()

    @property
    def identity(self) -> Mapping[str, str]:
        """Of each corpus: all of its loader's, and its share."""
        found: dict[str, str] = {}
        for name, loader in self.loaders.items():
            found |= {f"{name}/{key}": value for key, value in loader.identity.items()}
            found[f"{name}/share"] = f"{self.counts[name]} of {self.period}"
            if "tokenizer" in loader.identity:
                found["tokenizer"] = loader.identity["tokenizer"]
        return found

    def rows(self, turns: RowIndices) -> Batch:
        """Return the rows of some turns, each from the corpus whose turn it is."""
        periods, places = np.divmod(turns, self.period)
        chosen, before = self._chosen[places], self._before[places]
        found = {
            key: np.empty((len(turns), *shape), dtype)
            for key, (shape, dtype) in self._layout.items()
        }
        for number, (name, loader) in enumerate(self.loaders.items()):
            mine = np.flatnonzero(chosen == number)
            if not len(mine):
                continue
            rows = loader.rows(periods[mine] * self.counts[name] + before[mine])
            assert _layout(rows) == self._layout, f"{name} changed the layout of its rows"
            for key, array in rows.items():
                found[key][mine] = array
        return found

    def rows_by_corpus(self, turn: int) -> dict[str, int]:
        """Return how many rows of each corpus come before a turn."""
        periods, place = divmod(turn, self.period)
        inside = np.bincount(self._chosen[:place], minlength=len(self.counts)).tolist()
        return {
            name: periods * count + extra
            for (name, count), extra in zip(self.counts.items(), inside, strict=True)
        }

    def epochs_by_corpus(self, turn: int) -> dict[str, float]:
        """Return how often each corpus has been read through before a turn.

        Corpora whose loader has no ``rows_per_epoch`` have no end and are left out.
        """
        sizes = {name: getattr(self.loaders[name], "rows_per_epoch", None) for name in self.counts}
        return {
            name: taken / size
            for name, taken in self.rows_by_corpus(turn).items()
            if (size := sizes[name])
        }

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield held-out rows of all corpora in the proportions of the mixture.

        The mean loss of these is that of the mixture. It ends when a corpus whose turn it is has
        no more rows: what others still hold would change the proportions.

        Parameters
        ----------
        limit : int, optional
            End with the row that brings the labels that count to this number, over all processes.

        Yields
        ------
        dict
            As from `batch`. In the last one, rows beyond the end repeat the last row, with labels
            of -100. Every process gets the same number of batches.
        """
        yield from self._shared(self._mixed_rows(limit))

    def evaluation_batches_by_corpus(self, limit: int | None = None) -> Iterator[tuple[str, Batch]]:
        """Yield all held-out rows of one corpus after another, with its name.

        Parameters
        ----------
        limit : int, optional
            Of each corpus, as its loader counts.
        """
        for name, loader in self.loaders.items():
            for batch in self._shared(_held_out_rows(loader, limit)):
                yield name, batch

    def _mixed_rows(self, limit: int | None) -> Iterator[Batch]:
        streams = [_held_out_rows(loader, None) for loader in self.loaders.values()]
        n_labels, turn = 0, 0
        while limit is None or n_labels < limit:
            row = next(streams[self._chosen[turn % self.period]], None)
            if row is None:
                return
            n_labels += int(np.count_nonzero(row["labels"] != IGNORED_LABEL))
            yield row
            turn += 1

    def _shared(self, rows: Iterator[Batch]) -> Iterator[Batch]:
        """Put rows [1, ...] into batches of one shape and yield this process's share of each."""
        while batch := list(islice(rows, self.batch_size)):
            padding = {**batch[-1], "labels": np.full_like(batch[-1]["labels"], IGNORED_LABEL)}
            batch += [padding] * (self.batch_size - len(batch))
            part = self.batch_size // self.process_count
            mine = batch[self.process_index * part : (self.process_index + 1) * part]
            yield {key: np.concatenate([row[key] for row in mine]) for key in padding}

    def _common_layout(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        layouts = {
            name: _layout(loader.rows(np.zeros(1, np.int64)))
            for name, loader in self.loaders.items()
        }
        (first, common), *others = layouts.items()
        problems = [
            f"rows of {first!r} and {name!r} cannot stand in one batch: {_shown(common)} against "
            f"{_shown(layout)}; give loaders with the same settings"
            for name, layout in others
            if layout != common
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return common


def rows_per_period(weights: Mapping[str, int | float]) -> list[int]:
    """Return how many rows of a period each weight means: exact, or rounded to 100,000 in all.

    What is left by rounding down goes to the largest remainders.

    Raises
    ------
    ValueError
        If a weight is so small beside the others that no row of the period would be left to it.

    Examples
    --------
    >>> whole_shares({"books": 0.3, "code": 0.6, "web": 0.1})
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
            f"weights: {', '.join(absent)} would get less than one row of {MAX_PERIOD:,}; give "
            "it a larger weight, or leave it out"
        )
    return counts


def mixture_schedule(counts: list[int]) -> npt.NDArray[np.int64]:
    """Return whose turn it is, over a period, so that nobody is ever a whole turn off their share.

    Tijdeman 1980, "The chairman assignment problem" (Discrete Mathematics 32): among k states, it
    is always possible that none differs from its share by more than 1 - 1 / (2k - 2). That bound
    says from when to when each state's next turn can be; among those that can be now, the one that
    has to be soonest is taken, which finds an order wherever there is one.

    Parameters
    ----------
    counts : list of int
        Turns of each state, above 0.

    Returns
    -------
    int64 [sum of counts]
        The numbers of the states.

    Examples
    --------
    >>> chairmen([3, 1]).tolist()
    [0, 0, 1, 0]
    """
    period, parts = sum(counts), max(2 * len(counts) - 2, 2)
    opens: list[list[tuple[int, int]]] = [[] for _ in range(period)]
    for state, count in enumerate(counts):
        for k in range(count):  # the state's turn k lies between these two, both included
            earliest = -(-(parts * k + 1) * period // (parts * count)) - 1
            latest = (parts * (k + 1) - 1) * period // (parts * count)
            opens[earliest].append((latest, state))
    chosen = np.empty(period, np.int64)
    waiting: list[tuple[int, int]] = []
    for turn, opened in enumerate(opens):
        for window in opened:
            heapq.heappush(waiting, window)
        latest, chosen[turn] = heapq.heappop(waiting)
        assert latest >= turn
    return chosen


def _held_out_rows(loader: Loader, limit: int | None) -> Iterator[Batch]:
    """Yield the rows [1, ...] of a loader's held-out data that have a label."""
    for batch in loader.evaluation_batches(limit):
        labels = batch["labels"]
        counts = (labels != IGNORED_LABEL).reshape(len(labels), -1).any(axis=1)
        for row in np.flatnonzero(counts):
            yield {key: array[row : row + 1] for key, array in batch.items()}


def _layout(rows: Batch) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {key: (array.shape[1:], array.dtype) for key, array in rows.items()}


def _shown(layout: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> str:
    arrays = sorted(layout.items())
    return ", ".join(f"{key} {dtype}{list(shape)}" for key, (shape, dtype) in arrays)


def _wrong_weights(
    loaders: Mapping[str, Loader], weights: Mapping[str, int | float]
) -> Iterator[str]:
    if not loaders:
        yield "loaders is empty; a mixture needs at least one"
    for name in loaders.keys() - weights.keys():
        yield f"weights: {name!r} has none; give it a number above 0"
    for name in weights.keys() - loaders.keys():
        yield f"weights: {name!r} is not among the loaders: {', '.join(sorted(loaders))}"
    for name, weight in weights.items():
        if not (weight > 0 and math.isfinite(weight)):
            yield f"weights: {name}={weight} is not a number above 0; leave the corpus out instead"


def _differences(loaders: Mapping[str, Loader]) -> Iterator[str]:
    for name, loader in loaders.items():
        if loader.process_count != 1:
            yield (
                f"{name!r} was made with process_count={loader.process_count}; make it with 1: the "
                "mixture shares the rows among the processes"
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
                    f"{first!r} and {name!r} differ in {setting}: {str(expected)[:16]} against "
                    f"{str(value)[:16]}; a model reads rows of one kind"
                )
