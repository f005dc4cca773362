"""Byte reversal: correct labels, and random strings that do not repeat."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import ReversalLoader
from tjx_data.transforms.byte_reversal import END, FIRST_BYTE, START, decode


@settings(max_examples=20)
@given(max_length=st.integers(1, 12), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 10**6))
def test_labels_are_the_string_backwards(max_length: int, seed: int, step: int) -> None:
    batch = ReversalLoader(max_length=max_length, batch_size=6, seed=seed).batch(step)
    assert batch["source"].shape == (6, max_length)
    for source, mask, tokens, labels in zip(*batch.values(), strict=True):
        string = decode(source)
        assert mask.tolist() == [i < len(string) for i in range(max_length)]
        assert 1 <= len(string) <= max_length
        assert decode(labels) == string[::-1]
        # Each label is the next token, and decoder inputs start with the start token.
        assert tokens[0] == START
        assert labels[len(string)] == END
        assert decode(tokens) == string[::-1]
        assert set(labels[len(string) + 1 :].tolist()) <= {-100}


def test_lengths_and_bytes_are_equally_likely() -> None:
    batch = ReversalLoader(max_length=4, batch_size=20_000).batch(0)
    lengths = np.bincount(batch["source_mask"].sum(1), minlength=5)
    assert lengths[0] == 0
    assert abs(lengths[1:] / 5000 - 1).max() < 0.05
    counts = np.bincount(batch["source"][batch["source_mask"]] - FIRST_BYTE, minlength=256)
    assert abs(counts / counts.mean() - 1).max() < 0.35
    assert len(np.unique(batch["source"], axis=0)) > 14_000  # only strings of one byte repeat


def test_splits_are_independent() -> None:
    train, validation = (
        ReversalLoader(max_length=8, batch_size=16, split=split).batch(0)["source"].tobytes()
        for split in ("train", "validation")
    )
    assert train != validation


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 10**9),
    process_count=st.sampled_from([1, 2, 4, 8]),
)
def test_row_is_a_function_of_seed_and_row_index(seed: int, step: int, process_count: int) -> None:
    whole = ReversalLoader(max_length=5, batch_size=8, seed=seed).batch(step)
    for i in range(process_count):
        part = ReversalLoader(
            max_length=5, batch_size=8, seed=seed, process_index=i, process_count=process_count
        ).batch(step)
        for name, array in part.items():
            np.testing.assert_array_equal(array, np.split(whole[name], process_count)[i])
    one = ReversalLoader(max_length=5, batch_size=1, seed=seed).batch(8 * step + 3)
    np.testing.assert_array_equal(one["source"][0], whole["source"][3])


def test_evaluation_has_all_strings() -> None:
    loader = ReversalLoader(max_length=3, batch_size=64, split="validation")
    rows = [(batch["labels"] >= 0).any(1).sum() for batch in loader.evaluation_batches()]
    assert sum(rows) == ReversalLoader.validation_strings
    assert sum((b["labels"] >= 0).any(1).sum() for b in loader.evaluation_batches(70)) == 70


def test_fingerprint_covers_everything_that_determines_strings() -> None:
    def fingerprint(**given_: Any) -> str:
        return ReversalLoader(**{"max_length": 5, "batch_size": 8, **given_}).fingerprint

    others: list[dict[str, Any]] = [
        {}, {"max_length": 6}, {"batch_size": 4}, {"seed": 2}, {"split": "validation"}
    ]  # fmt: skip
    assert len({fingerprint(**other) for other in others}) == len(others)
    assert fingerprint() == fingerprint(process_index=1, process_count=2)


def test_invalid_arguments_are_all_reported() -> None:
    with pytest.raises(ValueError, match=r"(?s)at least 1 byte.*batch_size: got 0"):
        ReversalLoader(max_length=0, batch_size=0)
