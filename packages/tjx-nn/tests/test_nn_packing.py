"""Packed documents are computed as separate rows."""

import itertools
from collections.abc import Callable

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_nn import GPTConfig
from tjx_nn.binding import Params

Run = Callable[..., np.ndarray]


@settings(max_examples=15)
@given(borders=st.sets(st.integers(1, 15), max_size=4), seed=st.integers(0, 99))
def test_packed_documents_equal_separate_calls(
    tiny: GPTConfig, params: Params, run: Run, borders: set[int], seed: int
) -> None:
    length = tiny.max_seq_len
    packed = np.random.default_rng(seed).integers(0, tiny.vocab_size, (1, length), np.int32)
    edges = [0, *sorted(borders), length]
    spans = list(itertools.pairwise(edges))
    segment_ids = np.zeros((1, length), np.int32)
    # One document a row, padded on the right: a causal model ignores the padding.
    separate = np.zeros((5, length), np.int32)
    for row, (start, end) in enumerate(spans):
        segment_ids[:, start:end] = row + 1
        separate[row, : end - start] = packed[0, start:end]
    expected = run(tiny, params, separate)
    expected = np.concatenate([expected[r, : e - s] for r, (s, e) in enumerate(spans)])

    found = run(tiny, params, packed, segment_ids=segment_ids)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_explicit_positions_equal_default_positions(
    tiny: GPTConfig, params: Params, tokens: jax.Array, run: Run
) -> None:
    segment_ids = np.repeat(np.array([[5, 5, 5, 2], [1, 1, 1, 1]], np.int32), 4, axis=1)
    positions = np.array([[*range(12), *range(4)], [*range(16)]], np.int32)
    counted = run(tiny, params, tokens, segment_ids=segment_ids)
    given = run(tiny, params, tokens, segment_ids=segment_ids, positions=positions)
    np.testing.assert_array_equal(counted, given)
    straight = run(tiny, params, tokens, segment_ids=segment_ids, positions=positions[1:])
    assert np.abs(counted - straight)[0, 12:].max() > 1e-3
