"""Speculative decoding: the tokens of greedy decoding and the distribution of sampling."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn import GPTConfig, generate, speculative_generate
from tjx_nn.binding import Params

Run = Callable[..., np.ndarray]
Make = Callable[..., Params]
SMALL = GPTConfig(vocab_size=5, max_seq_len=64, n_layer=1, n_head=2, d_model=8)
# Windowed blocks: rejected proposals must not corrupt the ring buffer.
TARGET = dataclasses.replace(SMALL, n_layer=2, window=5, global_every=2)
LENGTHS = np.array([7, 1, 4], np.int32)
PROMPTS = np.random.default_rng(1).integers(0, 5, (3, 7), np.int32)


@pytest.fixture(scope="module")
def models(make: Make) -> tuple[Params, Params]:
    params = jax.device_get(make(TARGET, 2))
    # Without strong positions a random model repeats one token, which tests nothing.
    params["wpe"]["embedding"] = 8 * params["wpe"]["embedding"]
    return jax.device_put(params), make(SMALL, 3)


def speculate(models: tuple[Params, Params], *args: Any, **kwargs: Any) -> tuple[np.ndarray, float]:
    tokens, rate = jax.device_get(
        speculative_generate(TARGET, models[0], SMALL, models[1], *args, **kwargs)
    )
    return tokens, float(rate)


def test_greedy_tokens_equal_those_of_the_target(models: tuple[Params, Params]) -> None:
    plain = np.asarray(generate(TARGET, models[0], PROMPTS, LENGTHS, max_new_tokens=40))
    assert min(len(set(row)) for row in plain.tolist()) > 2
    tokens, rate = speculate(models, PROMPTS, LENGTHS, max_new_tokens=40)
    np.testing.assert_array_equal(tokens, plain)
    assert 0 < rate < 1
    # Rows end at different steps, in the middle of accepted proposals.
    stops = [int(plain[0, 5]), int(plain[1, 1])]
    stopped = generate(TARGET, models[0], PROMPTS, LENGTHS, max_new_tokens=40, stop_token=stops)
    tokens, _ = speculate(models, PROMPTS, LENGTHS, max_new_tokens=40, stop_token=stops)
    np.testing.assert_array_equal(tokens, np.asarray(stopped))


def test_all_proposals_of_an_identical_draft_are_accepted(models: tuple[Params, Params]) -> None:
    both = (TARGET, models[0])
    seeds = np.array([3, 4, 5])
    tokens, rate = jax.device_get(
        speculative_generate(
            *both, *both, PROMPTS, LENGTHS, max_new_tokens=12, temperature=1.0, seeds=seeds
        )
    )
    # Up to rounding: the draft decodes one token at a time, the target several.
    assert tokens.shape == (3, 12)
    assert rate > 0.99


@pytest.mark.parametrize(
    "filters", [pytest.param({}, marks=pytest.mark.slow), {"top_k": 3, "top_p": 0.9}]
)
def test_samples_have_the_distribution_of_the_target(
    models: tuple[Params, Params], run: Run, filters: dict[str, Any]
) -> None:
    rows, new, temperature = 8000, 3, 0.8
    prompt, ones = np.full((rows, 1), 3, np.int32), np.ones(rows, np.int32)
    seeds = np.arange(rows)
    tokens, rate = speculate(
        models, prompt, ones,
        max_new_tokens=new, draft_tokens=2, temperature=temperature, seeds=seeds, **filters,
    )  # fmt: skip
    assert 0.2 < rate < 0.95  # both acceptance and resampling occur
    every = np.stack(np.meshgrid(*[np.arange(5)] * new, indexing="ij"), -1).reshape(-1, new)
    sequences = np.concatenate([np.full((125, 1), 3), every], 1).astype(np.int32)
    logits = run(TARGET, models[0], sequences)[:, :-1].astype(np.float64) / temperature
    expected = np.ones(125)
    for t in range(new):
        p = np.exp(logits[:, t])
        if filters:
            order = np.argsort(-p, axis=1)
            ranked = np.take_along_axis(p, order, 1) * (np.arange(5) < 3)
            ranked /= ranked.sum(1, keepdims=True)
            ranked *= np.cumsum(ranked, 1) - ranked < 0.9
            np.put_along_axis(p, order, ranked, 1)
        p /= p.sum(1, keepdims=True)
        expected *= p[np.arange(125), every[:, t]]
    counts = np.bincount(tokens @ np.array([25, 5, 1]), minlength=125)
    assert counts[expected == 0].sum() == 0
    likely = rows * expected >= 5
    rest = rows - np.array([counts[likely].sum(), rows * expected[likely].sum()])
    terms = (counts - rows * expected)[likely] ** 2 / (rows * expected[likely])
    chi_square, degrees = terms.sum() + (rest[0] - rest[1]) ** 2 / max(rest[1], 1), likely.sum()
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


def test_samples_of_a_row_depend_only_on_its_seed(models: tuple[Params, Params]) -> None:
    sampled = {"max_new_tokens": 12, "temperature": 1.0}
    all_rows, _ = speculate(models, PROMPTS, LENGTHS, seeds=np.array([8, 9, 10]), **sampled)
    order = [2, 0, 1]
    moved, _ = speculate(
        models, PROMPTS[order], LENGTHS[order], seeds=np.array([10, 8, 9]), **sampled
    )
    np.testing.assert_array_equal(moved, all_rows[order])


def test_all_errors_are_in_one_exception(models: tuple[Params, Params]) -> None:
    draft = dataclasses.replace(SMALL, vocab_size=4, max_seq_len=32)
    with pytest.raises(ValueError, match=r"draft_config\.vocab_size: got 4") as error:
        speculative_generate(
            TARGET, models[0], draft, models[1], PROMPTS, LENGTHS,
            max_new_tokens=4, draft_tokens=0, repetition_penalty=2.0, temperature=-1.0,
        )  # fmt: skip
    assert len(str(error.value).splitlines()) == 5


def test_empty_requests_give_empty_results(models: tuple[Params, Params]) -> None:
    tokens, rate = speculate(models, PROMPTS, LENGTHS, max_new_tokens=0)
    assert tokens.shape == (3, 0)
    assert rate == 0
