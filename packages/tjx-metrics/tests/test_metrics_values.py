"""Metrics equal independent computations in NumPy float64."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_metrics import (
    bits_per_byte,
    bits_per_token,
    mfu,
    peak_flops,
    perplexity,
    top_k_accuracy,
    top_k_correct,
    transformer_flops_per_token,
)
from tjx_metrics.performance.peak_rates import PEAK_RATES

KS = (1, 2, 5, 10)
ROWS, VOCAB = 12, 7
counted = jax.jit(partial(top_k_correct, ks=KS))


@given(st.floats(0, 50))
def test_perplexity_and_bits_equal_numpy(nll: float) -> None:
    assert perplexity(nll) == pytest.approx(np.exp(np.float64(nll)), rel=1e-14)
    assert 2 ** bits_per_token(nll) == pytest.approx(perplexity(nll), rel=1e-12)


@pytest.mark.parametrize("make", [float, np.float32, np.float64, jax.device_put])
def test_python_numpy_and_jax_scalars_are_accepted(make: Any) -> None:
    assert perplexity(make(2.0)) == pytest.approx(math.e**2)
    assert bits_per_token(make(2.0)) == pytest.approx(2 / math.log(2))
    assert bits_per_byte(make(2.0), 4) == pytest.approx(0.5 / math.log(2))


def test_perplexity_of_huge_losses_is_inf_and_of_nan_is_nan() -> None:
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


@given(st.integers(1, 10**9), st.integers(2, 1000))
def test_bits_per_byte_of_a_uniform_distribution(n: int, size: int) -> None:
    assert bits_per_byte(n * math.log(size), n) == pytest.approx(math.log2(size), rel=1e-12)


def test_zero_bytes_are_an_error() -> None:
    with pytest.raises(ValueError, match="n_bytes: got 0; expected at least 1"):
        bits_per_byte(1.0, 0)


def by_hand(logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> list[int]:
    """Count row by row, with Python comparisons."""
    correct = [0] * len(KS)
    for row, label in zip(logits, labels, strict=True):
        if label == -100:
            continue
        better = sum(1 for x in row if x > row[label])
        correct = [n + (better < k) for n, k in zip(correct, KS, strict=True)]
    return correct


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_top_k_counts_equal_a_loop_with_ties_and_padding(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 3, (ROWS, VOCAB)) if ties else rng.normal(size=(ROWS, VOCAB))
    logits = logits.astype(np.float32)
    labels = rng.choice([-100, *range(VOCAB)], ROWS).astype(np.int32)

    got = counted(*jax.device_put((logits, labels)))

    assert got.dtype == jnp.int32
    assert np.asarray(got).tolist() == by_hand(logits, labels)


def test_top_k_counts_without_ties_equal_sorting() -> None:
    rng = np.random.default_rng(0)
    logits = rng.permuted(np.tile(np.arange(VOCAB), (ROWS, 1)), axis=1).astype(np.float32)
    labels = rng.integers(0, VOCAB, ROWS).astype(np.int32)
    order = np.argsort(-logits, axis=1)
    want = [int((order[:, :k] == labels[:, None]).any(axis=1).sum()) for k in KS]
    assert np.asarray(counted(*jax.device_put((logits, labels)))).tolist() == want


def test_nan_logits_are_never_correct() -> None:
    logits = np.zeros((ROWS, VOCAB), np.float32)
    logits[:, 0] = np.nan
    own = np.asarray(counted(*jax.device_put((logits, np.zeros(ROWS, np.int32)))))
    other = np.asarray(counted(*jax.device_put((logits, np.ones(ROWS, np.int32)))))
    assert own.tolist() == [0, 0, 0, 0]
    assert other.tolist() == [0, ROWS, ROWS, ROWS]


def test_counts_of_batches_sum_to_the_total() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, ROWS, VOCAB)).astype(np.float32)
    labels = rng.choice([-100, *range(VOCAB)], (2, ROWS)).astype(np.int32)
    whole = np.asarray(jax.jit(partial(top_k_correct, ks=KS))(*jax.device_put((logits, labels))))
    parts = [np.asarray(counted(*jax.device_put((logits[i], labels[i])))) for i in range(2)]
    assert (whole == parts[0] + parts[1]).all()

    accuracy = jax.jit(partial(top_k_accuracy, ks=KS))(*jax.device_put((logits, labels)))
    np.testing.assert_allclose(np.asarray(accuracy), whole / (labels != -100).sum(), rtol=1e-6)


def test_wrong_shapes_and_k_are_errors() -> None:
    logits, labels = jax.device_put((np.zeros((2, 3), "f"), np.zeros(3, np.int32)))
    with pytest.raises(ValueError, match="without its last axis"):
        top_k_correct(logits, labels)
    with pytest.raises(ValueError, match=r"ks: got \(0, 1\)"):
        top_k_correct(logits, jax.device_put(np.zeros(2, np.int32)), ks=(0, 1))


def test_mfu_of_unknown_devices_is_none() -> None:
    assert peak_flops("NVIDIA A10G") is None  # not an A10
    assert peak_flops("Tesla V100-SXM2-16GB") is None  # which multiplies no bfloat16
    assert mfu(1e6, 1e9, peak_flops("cpu")) is None
    # llm.c on an A100, GPT-2 124M: 218k tokens/s is published as 60 % (with 855 MFLOP per token).
    assert mfu(218e3, 855e6, peak_flops("NVIDIA A100-SXM4-80GB")) == pytest.approx(0.6, abs=0.005)
    assert mfu(8e6, 1e9, 1e15, n_devices=16) == 0.5


def test_peaks_depend_on_the_dtype() -> None:
    assert peak_flops("Tesla V100-SXM2-16GB", "float16") == 125e12
    with pytest.raises(ValueError, match="expected one of bfloat16, float16, float32, float8"):
        peak_flops("NVIDIA H200", "float64")
    for kind, rates in PEAK_RATES.items():
        assert not [rate for rate in rates if rate is not None and not 5e12 < rate < 1e16], kind
        if rates.bfloat16 is not None:
            assert rates.float16 in (None, rates.bfloat16), kind
            # TF32 has half the rate, a TPU multiplies float32 as bfloat16.
            share = 1.0 if kind.startswith("TPU") else 0.5
            assert rates.float32 == pytest.approx(share * rates.bfloat16, rel=0.03), kind
            if rates.float8 is not None and not kind.startswith("TPU v"):
                assert rates.float8 == pytest.approx(2 * rates.bfloat16, rel=0.03), kind


def test_flops_are_six_per_parameter_without_attention() -> None:
    flops = transformer_flops_per_token(n_params=100, n_layer=0, d_attention=8, seq_len=4)
    assert flops == 600.0
    longer = transformer_flops_per_token(n_params=100, n_layer=2, d_attention=8, seq_len=4)
    # Scores and weighted sum: 2 products of 2 * d * T, three times (backward is twice forward).
    assert longer - flops == 2 * (2 * 2 * 8 * 4) * 3
