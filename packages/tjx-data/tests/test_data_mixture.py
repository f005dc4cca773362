"""Mixtures: exact shares after any number of rows, and rows that depend on their index only."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data.config import DataConfig
from tjx_data.loading.base import IGNORED_LABEL, Batch, Loader, RowIndices
from tjx_data.loading.mixture import MixtureLoader
from tjx_data.loading.token_loader import TokenLoader
from tjx_data.mixtures.mixture_weights import (
    MAX_PERIOD,
    limit_epochs,
    mixture_schedule,
    rows_per_period,
    temperature_weights,
)
from tjx_data.transforms.masked_lm import MaskedLoader


class Counting(Loader):
    """Rows whose tokens are the row index and labels the corpus; held-out labels are 0, 1, ..."""

    def __init__(
        self,
        corpus: int,
        *,
        width: int = 3,
        rows_per_epoch: int | None = 10,
        held_out: int = 7,
        tokenizer: str | None = "one",
        dtype: Any = np.int32,
        process_count: int = 1,
    ) -> None:
        super().__init__(batch_size=4, process_count=process_count)
        self.corpus, self.seq_len, self.held_out, self.dtype = corpus, width, held_out, dtype
        self.tokenizer = tokenizer
        if rows_per_epoch is not None:
            self.rows_per_epoch = rows_per_epoch
        self.largest = -1

    def rows(self, row_indices: RowIndices) -> Batch:
        assert (np.diff(row_indices) > 0).all()
        self.largest = max(self.largest, int(row_indices.max()))
        tokens = np.repeat(row_indices[:, None], self.seq_len, 1).astype(self.dtype)
        return {"tokens": tokens, "labels": np.full_like(tokens, self.corpus)}

    @property
    def identity(self) -> Mapping[str, str]:
        known = {} if self.tokenizer is None else {"tokenizer": self.tokenizer}
        return {"corpus": str(self.corpus), **known}

    def evaluation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        n_rows = self.held_out if limit is None else min(limit // self.seq_len, self.held_out)
        for first in range(0, n_rows, 4):
            numbers = first + np.arange(4)
            labels = np.repeat(numbers[:, None], self.seq_len, 1).astype(np.int32)
            labels[numbers >= n_rows] = IGNORED_LABEL
            yield {"tokens": np.full_like(labels, self.corpus), "labels": labels}


def mixture(weights: Mapping[str, float], **settings: Any) -> MixtureLoader:
    loaders = {name: Counting(number) for number, name in enumerate(sorted(weights))}
    return MixtureLoader(loaders, weights, **{"batch_size": 8, **settings})


shares = st.lists(st.integers(1, 60), min_size=1, max_size=9)


@given(shares)
@settings(max_examples=50)
def test_no_corpus_deviates_from_its_share_by_a_full_row(counts: list[int]) -> None:
    period = sum(counts)
    taken = mixture_schedule(counts)[:, None] == np.arange(len(counts))
    after = np.cumsum(taken, axis=0)  # [row_indices, corpora]
    exact = np.arange(1, period + 1)[:, None] * np.array(counts) / period
    # Tijdeman's bound, which is below 1.
    bound = 1 - 1 / max(2 * len(counts) - 2, 2)
    assert np.abs(after - exact).max() <= bound + 1e-9
    assert after[-1].tolist() == counts


@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers(1, 99), min_size=1),
    st.integers(0, 400),
    st.integers(0, 10**9),
)
@settings(max_examples=50)
def test_rows_of_each_corpus_come_in_order_without_a_gap(
    weights: dict[str, int], n_rows_read: int, far: int
) -> None:
    loader = mixture({name: weight / 100 for name, weight in weights.items()})
    rows = loader.rows(np.arange(n_rows_read + 1))
    total = sum(weights.values())
    for number, name in enumerate(sorted(weights)):
        row_indices = rows["tokens"][:n_rows_read][rows["labels"][:n_rows_read, 0] == number, 0]
        assert row_indices.tolist() == list(range(len(row_indices)))
        assert loader.rows_by_corpus(n_rows_read)[name] == len(row_indices)
        assert abs(len(row_indices) - n_rows_read * weights[name] / total) < 1
        assert abs(loader.rows_by_corpus(far)[name] - far * weights[name] / total) < 1
    # A row depends on its index only, not on the other rows of the call.
    single = loader.rows(np.array([n_rows_read]))
    for key, array in single.items():
        np.testing.assert_array_equal(array[0], rows[key][-1])


@pytest.mark.parametrize("n", [2, 4, 8])
def test_rows_of_processes_make_up_the_global_batch(n: int) -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    for step in (0, 1, 12345):
        whole = mixture(weights).batch(step)
        for i in range(n):
            part = mixture(weights, process_index=i, process_count=n)
            assert part.fingerprint == mixture(weights).fingerprint
            for key, array in part.batch(step).items():
                np.testing.assert_array_equal(array, np.split(whole[key], n)[i])


def test_decimal_weights_are_exact() -> None:
    assert rows_per_period({"a": 0.1, "b": 0.2}) == [1, 2]  # 0.1 + 0.2 in binary is not 0.3
    assert rows_per_period({"a": 7, "b": 7.0, "c": 0.07}) == [100, 100, 1]
    assert rows_per_period({"a": 1e-3, "b": 0.999}) == [1, 999]
    assert rows_per_period({"only": 0.123456789}) == [1]


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=6))
@settings(max_examples=30)
def test_weights_of_many_digits_are_rounded_to_the_maximum_period(weights: list[float]) -> None:
    counts = rows_per_period(dict(zip("abcdef", weights, strict=False)))
    assert sum(counts) <= MAX_PERIOD
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count / sum(counts) - weight / math.fsum(weights)) < 1 / MAX_PERIOD


def test_largest_remainders_are_rounded_up() -> None:
    thirds = {"a": 1.00001, "b": 1.00002, "c": 1.00003}
    assert rows_per_period(thirds) == [33333, 33333, 33334]
    with pytest.raises(ValueError, match="less than one row of 100,000 for b"):
        rows_per_period({"a": 1, "b": 1e-9})


def test_identity_covers_everything_that_determines_a_row() -> None:
    one = mixture({"a": 1, "b": 3})
    assert one.identity == {
        "a/corpus": "0", "a/tokenizer": "one", "a/share": "1 of 4",
        "b/corpus": "1", "b/tokenizer": "one", "b/share": "3 of 4",
        "tokenizer": "one",
    }  # fmt: skip
    assert mixture({"b": 0.75, "a": 0.25}).identity == one.identity
    others = [
        mixture({"a": 1, "b": 2}),
        mixture({"a": 1, "c": 3}),
        mixture({"a": 1, "b": 3}, batch_size=4),
        MixtureLoader({"a": Counting(0), "b": Counting(5)}, {"a": 1, "b": 3}, batch_size=8),
    ]
    assert len({loader.fingerprint for loader in [one, *others]}) == 5


def test_the_order_of_the_names_changes_nothing() -> None:
    loaders = {"a": Counting(0), "b": Counting(1), "c": Counting(2)}
    backwards = dict(reversed(loaders.items()))
    weights = {"a": 1, "b": 1, "c": 1}
    one, other = (MixtureLoader(given, weights, batch_size=9) for given in (loaders, backwards))
    np.testing.assert_array_equal(one.batch(5)["labels"], other.batch(5)["labels"])


def test_epochs_by_corpus_count_rows_read() -> None:
    loaders = {"a": Counting(0), "b": Counting(1, rows_per_epoch=None)}
    loader = MixtureLoader(loaders, {"a": 0.25, "b": 0.75}, batch_size=4)
    assert loader.epochs_by_corpus(0) == {"a": 0}
    for step in range(20):
        loader.batch(step)
    assert loaders["a"].largest == 19
    assert loader.epochs_by_corpus(80) == {"a": 2.0}


def test_a_mixture_can_be_part_of_another() -> None:
    inner = MixtureLoader({"x": Counting(0), "y": Counting(1)}, {"x": 1, "y": 1}, batch_size=1)
    outer = MixtureLoader({"z": Counting(2), "xy": inner}, {"z": 1, "xy": 2}, batch_size=600)
    corpora = np.bincount(outer.batch(0)["labels"][:, 0])
    assert corpora.tolist() == [200, 200, 200]
    assert outer.identity["xy/x/corpus"] == "0"


@pytest.mark.parametrize("n", [1, 2])
def test_evaluation_has_all_rows_of_each_corpus_by_name(n: int) -> None:
    loaders = {"a": Counting(0, held_out=7), "b": Counting(1, held_out=2)}
    found: dict[str, list[int]] = {"a": [], "b": []}
    for i in range(n):
        loader = MixtureLoader(
            loaders, {"a": 1, "b": 1}, batch_size=6, process_index=i, process_count=n
        )
        for name, batch in loader.evaluation_batches_by_corpus():
            assert batch["labels"].shape == (6 // n, 3)
            assert (batch["tokens"] == loaders[name].corpus).all()
            found[name] += batch["labels"][batch["labels"] >= 0].reshape(-1, 3)[:, 0].tolist()
    assert sorted(found["a"]) == list(range(7))
    assert sorted(found["b"]) == [0, 1]
    limited = list(loader.evaluation_batches_by_corpus(6))
    assert [name for name, _ in limited] == ["a", "b"]


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("limit", [None, 31])
def test_proportional_evaluation_ends_with_the_first_exhausted_corpus(
    n: int, limit: int | None
) -> None:
    loaders = {"a": Counting(0, held_out=3), "b": Counting(1, held_out=30)}
    rows: set[tuple[int, int]] = set()
    n_batches = set()
    for i in range(n):
        loader = MixtureLoader(
            loaders, {"a": 1, "b": 3}, batch_size=4, process_index=i, process_count=n
        )
        batches = list(loader.evaluation_batches(limit))
        n_batches.add(len(batches))
        for batch in batches:
            assert batch["labels"].shape == (4 // n, 3)
            pairs = zip(batch["tokens"][:, 0].tolist(), batch["labels"][:, 0].tolist(), strict=True)
            rows |= {(corpus, label) for corpus, label in pairs if label >= 0}
    assert len(n_batches) == 1
    of_a = sum(corpus == 0 for corpus, _ in rows)
    if limit is None:  # three rows of a, and the rows of b before its fourth
        assert of_a == 3
        assert 9 <= len(rows) - of_a <= 11
    else:
        assert len(rows) == 11  # the row that brings 31 labels
        assert of_a == 3


def test_invalid_arguments_are_all_reported() -> None:
    loaders = {"a": Counting(0), "b": Counting(1), "c": Counting(2)}
    with pytest.raises(ValueError, match="weights") as error:
        MixtureLoader(loaders, {"a": -1, "b": math.nan, "d": 0}, changes={-1: {}}, batch_size=1)
    message = str(error.value)
    assert len(message.splitlines()) == 6
    for part in (
        "a=-1",
        "b=nan",
        "d=0",
        "got none for 'c'",
        "got 'd'; expected names of loaders: a, b, c",
        "changes: got {} at step -1",
    ):
        assert part in message
    with pytest.raises(ValueError, match="expected at least one"):
        MixtureLoader({}, {}, batch_size=1)
    with pytest.raises(ValueError, match="a=inf; expected a finite number"):
        MixtureLoader({"a": Counting(0)}, {"a": math.inf}, batch_size=1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Counting(1, width=4), r"got 'b' with seq_len 4; expected that of 'a', 3"),
        (Counting(1, tokenizer="two"), r"got 'b' with tokenizer two; expected that of 'a', one"),
        (
            Counting(1, dtype=np.int64),
            r"got rows of 'b' with .*int64.*'a', .* tokens int32\[3\]",
        ),
        (Counting(1, process_count=2), r"got 'b' with process_count=2"),
    ],
    ids=["seq_len", "tokenizer", "dtype", "processes"],
)
def test_incompatible_loaders_are_named(other: Counting, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureLoader({"a": Counting(0), "b": other}, {"a": 1, "b": 1}, batch_size=1)
    fits = {"a": Counting(0), "b": Counting(1, tokenizer=None)}
    MixtureLoader(fits, {"a": 1, "b": 1}, batch_size=1)


def test_masked_rows_of_a_mixture_are_evaluated_by_corpus() -> None:
    settings_ = {"vocab_size": 50, "seq_len": 8, "batch_size": 4}
    tokens = {name: np.arange(100) * step % 40 for name, step in (("a", 3), ("b", 7))}
    loaders = {
        name: TokenLoader.from_tokens(each, **settings_)  # type: ignore[arg-type]
        for name, each in tokens.items()
    }
    masking: dict[str, Any] = {"mask_id": 49, "vocab_size": 50, "seed": 3}
    mixed = MaskedLoader(MixtureLoader(loaders, {"a": 1, "b": 2}, batch_size=4), **masking)
    found = list(mixed.evaluation_batches_by_corpus())
    for name, loader in loaders.items():
        alone = list(MaskedLoader(loader, **masking).evaluation_batches())
        own = [batch for corpus, batch in found if corpus == name]
        assert len(own) == len(alone)
        for a, b in zip(own, alone, strict=True):
            is_text = (b["labels"] != IGNORED_LABEL) | (b["tokens"] != 0)
            np.testing.assert_array_equal(a["labels"], b["labels"])
            np.testing.assert_array_equal(a["tokens"][is_text], b["tokens"][is_text])
    # One corpus is no mixture.
    assert list(MaskedLoader(loaders["a"], **masking).evaluation_batches_by_corpus()) == []


CURRICULUM: dict[int, dict[str, float]] = {
    0: {"a": 3, "b": 1}, 5: {"b": 1}, 9: {"a": 0.2, "b": 0.3, "c": 0.5},
}  # fmt: skip


def curriculum(**settings: Any) -> MixtureLoader:
    loaders = {name: Counting(number) for number, name in enumerate("abc")}
    changes = {step: weights for step, weights in CURRICULUM.items() if step}
    return MixtureLoader(
        loaders, CURRICULUM[0], changes=changes, **{"batch_size": 8, **settings}
    )  # fmt: skip


def test_a_curriculum_changes_shares_at_its_steps_and_continues_the_rows() -> None:
    loader = curriculum()
    rows = loader.rows(np.arange(20 * 8))
    corpora, numbers = rows["labels"][:, 0], rows["tokens"][:, 0]
    counts = [np.bincount(corpora[8 * a : 8 * b], minlength=3).tolist() for a, b in
              ((0, 5), (5, 9), (9, 19))]  # fmt: skip
    assert counts == [[30, 10, 0], [0, 32, 0], [16, 24, 40]]
    for corpus in range(3):  # none is skipped, none is read twice
        own = numbers[corpora == corpus]
        assert own.tolist() == list(range(len(own)))
    assert loader.rows_by_corpus(19 * 8) == {"a": 46, "b": 66, "c": 40}
    # A step depends on its number only, in any order and in any division among processes.
    for step in (13, 4, 5, 8, 9, 0):
        whole = curriculum().batch(step)
        np.testing.assert_array_equal(whole["tokens"][:, 0], numbers[8 * step : 8 * step + 8])
        parts = [curriculum(process_index=i, process_count=2).batch(step) for i in range(2)]
        for key, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), array)
    assert loader.identity["a/share"] == "3 of 4; from row 40 0 of 1; from row 72 2 of 10"
    assert loader.fingerprint != mixture({"a": 3, "b": 1}).fingerprint
    # Evaluation has the last weights at every step.
    rows_read = [batch["tokens"][batch["labels"] >= 0] for batch in loader.evaluation_batches(30)]
    assert np.bincount(np.concatenate(rows_read)).tolist() == [6, 9, 15]


def test_temperature_weights_are_powers_of_sizes() -> None:
    sizes = {"a": 1, "b": 16, "c": 81}
    assert temperature_weights(sizes, 1)["c"] == pytest.approx(81 / 98)
    for name, weight in temperature_weights(sizes, 4).items():
        assert weight == pytest.approx(sizes[name] ** 0.25 / 6)
    assert temperature_weights(sizes, 1e9)["a"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="temperature: got 0; expected a number above 0"):
        temperature_weights(sizes, 0)
    with pytest.raises(ValueError, match="sizes: got none for d"):
        temperature_weights({"d": 0}, 1)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 200)), min_size=1, max_size=5),
    st.integers(1, 60),
)
@settings(max_examples=50)
def test_no_corpus_is_repeated_beyond_the_limit(
    given_: list[tuple[int, int]], n_steps: int
) -> None:
    weights = dict(zip("abcde", (float(weight) for weight, _ in given_), strict=False))
    sizes = dict(zip("abcde", (size for _, size in given_), strict=False))
    n_rows, limits = 8 * n_steps, {name: 2.5 * size for name, size in sizes.items()}
    by_step: dict[int, dict[str, float]] = {0: weights, 7: weights}
    arguments: dict[str, Any] = {"n_steps": n_steps, "batch_size": 8, "max_epochs": 2.5}
    if sum(int(limit) for limit in limits.values()) < n_rows:
        with pytest.raises(ValueError, match=r"max_epochs: got 2.5; expected text for the"):
            limit_epochs(by_step, sizes, **arguments)
        return
    found = limit_epochs(by_step, sizes, **arguments)
    loader = MixtureLoader(
        {name: Counting(i) for i, name in enumerate(weights)},
        found[0], changes={7: found[7]}, batch_size=8,
    )  # fmt: skip
    rows = loader.rows_by_corpus(n_rows)
    assert all(rows[name] <= limits[name] for name in rows)
    # Corpora below the limit keep their proportions: one row of rounding for each change.
    free = [name for name in rows if rows[name] < int(limits[name]) - 2]
    for a in free:
        for b in free:
            assert abs(rows[a] / weights[a] - rows[b] / weights[b]) <= 4 / min(weights.values())


def test_configured_mixtures_have_weights_by_step() -> None:
    config = DataConfig(mixture="a.txt=3,b.txt=1", curriculum="5:b.txt=1; 9:a.txt=1,c.txt=1")
    assert config.weights == {"a.txt": 3, "b.txt": 1, "c.txt": 0}
    assert list(config.weights_by_step) == [0, 5, 9]
    assert DataConfig(mixture="a.txt, b.txt", mixture_temperature=3).weights == {
        "a.txt": 1, "b.txt": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture_temperature": 3}, "mixture: got 'a.txt=3'; expected NAME without a weight"),
        ({"mixture_temperature": 0}, "mixture_temperature: got 0; expected a number above 0"),
        ({"mixture": None, "max_epochs": 4}, "max_epochs: got a value without a mixture"),
        ({"curriculum": "9:b.txt=1;9:a.txt=1"}, "curriculum: got '9:a.txt=1'; expected STEP:"),
        ({"curriculum": "0:b.txt=1"}, "expected STEP:NAME=WEIGHT,... with ascending steps above 0"),
        ({"curriculum": "9:b.txt"}, "curriculum: got 'b.txt'; expected NAME=WEIGHT"),
        ({"curriculum": "9:c.bin=1"}, "curriculum: got 'c.bin'; expected text"),
        (
            {"curriculum": "9:b.txt=1", "mixture_temperature": 3},
            "curriculum: got weights of steps with mixture_temperature",
        ),
        ({"stream": True, "max_epochs": 3}, "max_epochs: got 3 with stream"),
    ],
)
def test_invalid_mixtures_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DataConfig(**{"mixture": "a.txt=3,b.txt=1", **changes})
