"""Span corruption: source and target contain the text, in fixed shapes."""

from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import SpanLoader, TokenLoader, char_tokenizer, prepare

ALPHABET = "".join(chr(0x4E00 + i) for i in range(3000))
# All tokens of the stream are distinct, so that a row shows its position in the stream.
DISTINCT = char_tokenizer([ALPHABET])
VOCAB = DISTINCT.vocab_size


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose training stream is 0, 1, 2, ..., continued by the validation stream."""
    folder = tmp_path_factory.mktemp("spans") / "set"
    prepare([ALPHABET], DISTINCT, folder, holdout="tail", holdout_fraction=1 / 3)
    return folder


def text_loader(directory: Path, **given_: Any) -> TokenLoader:
    return TokenLoader(directory, **{"seq_len": 100, "batch_size": 8, "seed": 5, **given_})


def spans(text: TokenLoader, **given_: Any) -> SpanLoader:
    return SpanLoader(text, **{"vocab_size": VOCAB, **given_})


def read_pair(loader: SpanLoader, source: np.ndarray, target: np.ndarray) -> list[list[int]]:
    """Return the parts of a pair in text order: text, span, text, span, ..., text."""
    written: list[list[int]] = []
    for token in target.tolist():
        if VOCAB <= token < loader.start_id:
            assert token == VOCAB + len(written)  # each sentinel once, in order
            written.append([])
        else:
            written[-1].append(token)
    parts: list[list[int]] = [[]]
    for token in source.tolist():
        if token >= VOCAB:
            assert token == VOCAB + len(parts) // 2
            parts += [written[len(parts) // 2], []]
        else:
            parts[-1].append(token)
    assert len(parts) == 2 * len(written) + 1
    return parts


@settings(max_examples=50)
@given(
    seq_len=st.integers(2, 90),
    rate=st.floats(0.01, 0.99),
    mean_length=st.floats(1, 20),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 10**9),
)
def test_source_and_target_reconstruct_the_text(
    directory: Path, seq_len: int, rate: float, mean_length: float, seed: int, step: int
) -> None:
    text = text_loader(directory, seq_len=seq_len, seed=seed)
    loader = spans(text, rate=rate, mean_length=mean_length)
    batch = loader.batch(step)
    assert batch["source"].shape == (8, loader.source_len)
    assert batch["labels"].shape == batch["tokens"].shape == (8, loader.target_len)
    assert batch["source_mask"].all()
    rows = zip(
        text.batch(step)["tokens"], batch["source"], batch["tokens"], batch["labels"], strict=True
    )
    for tokens, source, given_, labels in rows:
        # Each label is the token after; before the first is the start, after the last the end.
        assert given_[0] == loader.start_id
        assert labels[-1] == loader.end_id
        np.testing.assert_array_equal(given_[1:], labels[:-1])
        parts = read_pair(loader, source, labels[:-1])
        assert [*chain(*parts)] == tokens.tolist()
        assert len(parts) == 2 * loader.n_sentinels + 1
        assert all(parts[1:-1])  # no span is empty, and no two of them touch
        n_noise = sum(map(len, parts[1::2]))
        assert abs(n_noise - seq_len * rate) <= 1
        assert max(source.max(), given_.max(), labels.max()) < loader.n_ids


def test_shapes_match_the_paper(directory: Path) -> None:
    loader = spans(text_loader(directory, seq_len=512))
    # 15 % of 512 tokens in spans of 3: 77 tokens, 26 spans.
    assert (loader.source_len, loader.target_len) == (512 - 77 + 26, 77 + 26 + 1)
    ids = [loader.start_id, loader.end_id, loader.pad_id, loader.n_ids]
    assert ids == [VOCAB + 26, VOCAB + 27, VOCAB + 28, VOCAB + 29]


def test_spans_are_uniform_and_have_the_mean_length(directory: Path) -> None:
    loader = spans(text_loader(directory))
    rows = loader.rows(np.arange(4000))
    counts, lengths = np.zeros(100), []
    for source, labels in zip(rows["source"], rows["labels"], strict=True):
        parts = read_pair(loader, source, labels[:-1])
        edges = np.cumsum([0, *map(len, parts)])
        for start, end in list(pairwise(edges))[1::2]:
            counts[start:end] += 1
            lengths.append(end - start)
    # 15 of 100 tokens; fewer spans cover the ends, equally at both.
    shares = counts / 4000
    assert abs(shares[6:-6] - shares[6:-6].mean()).max() < 0.025
    assert shares[0] > 0.04
    assert abs(shares[:6] - shares[:-7:-1]).max() < 0.025
    assert np.mean(lengths) == 3
    # Of the ways to cut 15 into 5 parts, C(14, 4), those with a first part n: C(14 - n, 3).
    expected = [np.prod([14 - n, 13 - n, 12 - n]) / 6 / 1001 for n in range(1, 5)]
    np.testing.assert_allclose(np.bincount(lengths)[1:5] / len(lengths), expected, atol=0.01)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 10**9),
    process_count=st.sampled_from([1, 2, 4, 8]),
)
def test_row_is_a_function_of_seed_and_row_index(
    directory: Path, seed: int, step: int, process_count: int
) -> None:
    whole = spans(text_loader(directory, seed=seed)).batch(step)
    for i in range(process_count):
        text = text_loader(directory, seed=seed, process_index=i, process_count=process_count)
        for name, values in spans(text).batch(step).items():
            np.testing.assert_array_equal(values, np.split(whole[name], process_count)[i])
    one = spans(text_loader(directory, seed=seed, batch_size=1)).batch(8 * step + 3)
    np.testing.assert_array_equal(one["source"][0], whole["source"][3])


def test_each_epoch_corrupts_other_spans(directory: Path) -> None:
    text = text_loader(directory, seq_len=99)
    n = text.rows_per_epoch
    rows = spans(text).rows(np.arange(3 * n))
    plain = text.rows(np.arange(3 * n))["tokens"]
    lost = {
        tuple(np.flatnonzero(~np.isin(row, source)))
        for source, row in zip(rows["source"], plain, strict=True)
    }
    assert len(lost) == 3 * n


def test_evaluation_has_the_whole_text_and_the_same_spans_on_every_pass(directory: Path) -> None:
    def rows(batch_size: int, limit: int | None = None, **given_: Any) -> list[dict[str, Any]]:
        text = text_loader(
            directory, split="validation", batch_size=batch_size, seq_len=30, **given_
        )
        batches = list(spans(text).evaluation_batches(limit))
        assert len({batch["source"].shape for batch in batches}) == 1
        return [
            {name: values[i] for name, values in batch.items()}
            for batch in batches
            for i in range(len(batch["labels"]))
        ]

    text = text_loader(directory, split="validation", seq_len=30)
    loader = spans(text)
    seen: list[int] = []
    for row in rows(4):
        np.testing.assert_array_equal(row["source_mask"], row["source"] != loader.pad_id)
        source, labels = row["source"][row["source_mask"]], row["labels"][row["labels"] != -100]
        if len(labels):
            assert labels[-1] == loader.end_id
            seen += chain(*read_pair(loader, source, labels[:-1]))
    start = text.read(0, 1)[0]
    assert seen == list(range(start, start + text.n_tokens - 1))
    assert (text.n_tokens - 1) % 30 > 1  # a short row was among them

    first = rows(4)
    for other in (rows(4), rows(5)):
        for a, b in zip(first, other, strict=False):
            np.testing.assert_array_equal(a["source"], b["source"])
    second_halves = [row for number, row in enumerate(first) if number % 4 >= 2]
    for a, b in zip(second_halves, rows(4, process_index=1, process_count=2), strict=True):
        np.testing.assert_array_equal(a["labels"], b["labels"])
    # Of 61 tokens the last row has 1, which makes no pair.
    counted = [(row["labels"] != -100).any() for row in rows(4, limit=61)]
    assert counted == [True, True, False, False]


def test_fingerprint_covers_everything_that_determines_spans(directory: Path) -> None:
    prints = {
        spans(text_loader(directory, seed=seed), rate=rate, mean_length=mean_length).fingerprint
        for seed, rate, mean_length in (
            (5, 0.15, 3.0),
            (6, 0.15, 3.0),
            (5, 0.2, 3.0),
            (5, 0.15, 4.0),
        )
    }
    assert len(prints) == 4


def test_invalid_arguments_are_all_reported(directory: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"(?s)vocab_size.*rate: got 1.*mean_length: got 0.5.*seq_len",
    ):
        spans(text_loader(directory, seq_len=1), vocab_size=0, rate=1.0, mean_length=0.5)
    with pytest.raises(ValueError, match=r"packing: got 'documents'"):
        spans(text_loader(directory, packing="documents"))
