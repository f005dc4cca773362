"""Strings and their reversals: what a model is to learn is right, and never the same string."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import ReversalLoader
from tjx_data.reversal import END, START, decode


@settings(max_examples=20, deadline=None)
@given(max_length=st.integers(1, 12), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 10**6))
def test_labels_are_the_string_backwards(max_length: int, seed: int, step: int) -> None:
    batch = ReversalLoader(max_length=max_length, batch_size=6, seed=seed).batch(step)
    for source, tokens, labels in zip(*batch.values(), strict=True):
        string = decode(source)
        assert 1 <= len(string) <= max_length
        assert decode(labels) == string[::-1]
        # Each label is the token after, and what a decoder is fed begins with the start.
        assert tokens[0] == START
        assert labels[len(string)] == END
        assert decode(tokens) == string[::-1]
        assert set(labels[len(string) + 1 :].tolist()) <= {-100}


def test_the_splits_have_nothing_to_do_with_each_other() -> None:
    train, validation = (
        ReversalLoader(max_length=8, batch_size=16, split=split).batch(0)["source"].tobytes()
        for split in ("train", "validation")
    )
    assert train != validation


def test_processes_share_a_batch() -> None:
    whole = ReversalLoader(max_length=5, batch_size=6, seed=1).batch(3)
    for i in range(3):
        part = ReversalLoader(
            max_length=5, batch_size=6, seed=1, process_index=i, process_count=3
        ).batch(3)
        for name, array in part.items():
            np.testing.assert_array_equal(array, whole[name][i::3])


def test_evaluation_counts_as_many_strings_as_there_are() -> None:
    loader = ReversalLoader(max_length=3, batch_size=64, split="validation")
    rows = [(batch["labels"] >= 0).any(1).sum() for batch in loader.evaluation_batches()]
    assert sum(rows) == ReversalLoader.validation_strings
    assert sum((b["labels"] >= 0).any(1).sum() for b in loader.evaluation_batches(70)) == 70


def test_wrong_numbers_are_told() -> None:
    with pytest.raises(ValueError, match="at least 1 byte"):
        ReversalLoader(max_length=0, batch_size=2)
