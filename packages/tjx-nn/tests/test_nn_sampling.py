"""Sampling: filters against NumPy, and samples against their distribution."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn.generation.sampling import (
    SamplingOptions,
    apply_repetition_penalty,
    check_sampling,
    log_probs_of,
    make_sampling,
    probabilities,
    sample_tokens,
)

LOGITS = np.random.default_rng(0).normal(0, 2, (5, 23)).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    result: np.ndarray = e / e.sum()
    return result


def found(logits: np.ndarray = LOGITS, **options: Any) -> np.ndarray:
    given: Any = {"temperature": 1.0, "key": None, "seeds": np.arange(len(logits)), **options}
    assert not check_sampling(logits.shape[1], len(logits), given)
    sampling = make_sampling(len(logits), given)
    return np.asarray(jax.jit(probabilities)(*jax.device_put((logits, sampling))))


def kept(p: np.ndarray, keep: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.where(keep, p, 0) / p[keep].sum()
    return result


def most_likely(p: np.ndarray, top_k: int) -> np.ndarray:
    keep = np.zeros(len(p), bool)
    keep[np.argsort(-p)[:top_k]] = True
    return kept(p, keep)


def nucleus(p: np.ndarray, top_p: float) -> np.ndarray:
    keep, total = np.zeros(len(p), bool), 0.0
    for token in np.argsort(-p):
        keep[token] = True
        total += p[token]
        if total >= top_p:
            break
    return kept(p, keep)


def not_too_unlikely(p: np.ndarray, min_p: float) -> np.ndarray:
    return kept(p, p >= min_p * p.max())


@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        ({}, lambda p: p),
        ({"top_k": 1}, lambda p: most_likely(p, 1)),
        ({"top_k": 6}, lambda p: most_likely(p, 6)),
        ({"top_k": 23}, lambda p: p),
        ({"top_p": 1e-6}, lambda p: most_likely(p, 1)),
        ({"top_p": 0.3}, lambda p: nucleus(p, 0.3)),
        ({"top_p": 0.9}, lambda p: nucleus(p, 0.9)),
        ({"top_p": 1.0}, lambda p: p),
        ({"min_p": 0.0}, lambda p: p),
        ({"min_p": 0.2}, lambda p: not_too_unlikely(p, 0.2)),
        ({"min_p": 1.0}, lambda p: most_likely(p, 1)),
        # top-p applies to what top-k keeps.
        (
            {"top_k": 8, "top_p": 0.7, "min_p": 0.1},
            lambda p: not_too_unlikely(nucleus(most_likely(p, 8), 0.7), 0.1),
        ),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_filters_equal_numpy(
    options: dict[str, Any], oracle: Callable[[np.ndarray], np.ndarray], temperature: float
) -> None:
    expected = np.stack([oracle(softmax(row / temperature)) for row in LOGITS])
    p = found(temperature=temperature, **options)
    np.testing.assert_array_equal(p > 0, expected > 0)
    np.testing.assert_allclose(p, expected, rtol=1e-4)


def test_top_p_keeps_the_token_that_reaches_the_sum() -> None:
    p = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32))
    np.testing.assert_allclose(found(p, top_p=0.5)[0], [1, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found(p, top_p=0.51)[0], [2 / 3, 1 / 3, 0, 0], atol=1e-6)


def test_top_p_of_one_keeps_tokens_after_which_rounding_exceeds_one() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (32, 64)).astype(np.float32)
    assert (found(logits, top_p=1.0) > 0).all()


def test_ties_with_the_last_kept_token_are_kept() -> None:
    np.testing.assert_allclose(found(np.zeros((1, 4), np.float32), top_k=2)[0], [0.25] * 4)


def test_repetition_penalty_lowers_logits_of_both_signs() -> None:
    logits = np.array([[2.0, -2.0, 1.0, -1.0]], np.float32)
    seen = np.array([[True, True, False, False]])
    penalty = np.float32(4)
    lower = jax.jit(apply_repetition_penalty)(*jax.device_put((logits, seen, penalty)))
    np.testing.assert_array_equal(np.asarray(lower), [[0.5, -8.0, 1.0, -1.0]])


def test_samples_follow_the_distribution_and_greedy_is_argmax() -> None:
    rows = 20_000
    many = np.broadcast_to(LOGITS[:1], (rows, 23))
    options: SamplingOptions = {"temperature": 0.8, "top_p": 0.95, "seeds": np.arange(rows) - 7}
    sampling = make_sampling(rows, options)
    drawn = np.asarray(jax.jit(sample_tokens)(*jax.device_put((many, sampling, np.int32(3)))))
    share = np.bincount(drawn, minlength=23) / rows
    expected = found(LOGITS[:1], temperature=0.8, top_p=0.95)[0]
    assert np.all(np.abs(share - expected) <= 5 * np.sqrt(expected / rows))
    greedy = jax.jit(sample_tokens)(*jax.device_put((LOGITS, make_sampling(5, {}), np.int32(0))))
    np.testing.assert_array_equal(np.asarray(greedy), LOGITS.argmax(1))


def test_log_probabilities_equal_log_softmax() -> None:
    tokens = np.array([0, 5, 22, 7, 7], np.int32)
    log_probs = np.asarray(jax.jit(log_probs_of)(*jax.device_put((LOGITS, tokens))))
    expected = [np.log(softmax(row)[t]) for row, t in zip(LOGITS, tokens, strict=True)]
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5)


def test_all_errors_are_listed() -> None:
    options: SamplingOptions = {
        "temperature": -1.0, "top_k": 24, "top_p": 0.0, "min_p": 1.5, "repetition_penalty": 0.0,
        "seeds": np.array([1, 2**32]),
    }  # fmt: skip
    problems = check_sampling(23, 3, options)
    names = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seeds"]
    assert [problem.split(":")[0] for problem in problems] == names
    assert "without key and seeds" in check_sampling(23, 3, {"temperature": 1.0})[0]
