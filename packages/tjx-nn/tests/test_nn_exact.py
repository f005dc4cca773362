"""Exact log-probabilities: sampling and scoring give a row the same bits in any batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn import GPTConfig, LatentConfig, generate, generate_exact
from tjx_nn.binding import Params

Make = Callable[..., Params]
Run = Callable[..., np.ndarray]
BASE = GPTConfig(vocab_size=11, max_seq_len=48, n_layer=2, n_head=4, d_model=16, positions="rope")
KINDS: dict[str, GPTConfig] = {
    "mha": BASE,
    "gqa": dataclasses.replace(BASE, n_kv_head=2),
    "window": dataclasses.replace(BASE, window=5, global_every=2),
    "mla": dataclasses.replace(BASE, latent=LatentConfig(kv_dim=8, rope_dim=4)),
}
NEW = 12
ROWS = 32
STOP = [3, 5, 7]


def prompts() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.integers(0, 11, (ROWS, 9), np.int32), draw.integers(1, 10, ROWS).astype(np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_scoring_repeats_the_bits_of_sampling_in_any_batch(
    kind: str, dtype: Any, make: Make
) -> None:
    config = dataclasses.replace(KINDS[kind], dtype=dtype)
    # Four times the weights: differences of the order of summation grow.
    params = jax.device_put(jax.tree.map(lambda p: 4 * p, jax.device_get(make(config, 1))))
    tokens, lengths = prompts()
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 3.0, "stop_token": STOP}

    def exact(rows: np.ndarray, responses: np.ndarray | None = None) -> Any:
        return generate_exact(
            config, params, tokens[rows], lengths[rows], responses=responses, seeds=rows, **options
        )

    every = np.arange(ROWS)
    sampled, log_probs = exact(every)
    ends = np.isin(sampled, STOP).argmax(1)
    assert len(set(ends.tolist())) > 3, "rows end at different steps"
    # Other batch sizes, orders and neighbours: rows join and leave the program.
    shuffled = np.random.default_rng(1).permutation(ROWS)
    for rows in (every[:1], every[5:13], shuffled):
        found = exact(rows, sampled[rows])
        np.testing.assert_array_equal(found[0], sampled[rows])
        np.testing.assert_array_equal(found[1].view(np.int32), log_probs[rows].view(np.int32))
    again = exact(every[8:16])
    np.testing.assert_array_equal(again[0], sampled[8:16])
    np.testing.assert_array_equal(again[1].view(np.int32), log_probs[8:16].view(np.int32))


def test_log_probs_are_those_of_the_model(make: Make, run: Run) -> None:
    config, (tokens, lengths) = KINDS["gqa"], prompts()
    params = make(config, 1)
    responses = np.random.default_rng(2).choice([0, 1, 4, 10], (ROWS, NEW)).astype(np.int32)
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0.5, "stop_token": STOP}
    _, found = generate_exact(config, params, tokens, lengths, responses=responses, **options)
    for row in range(3):
        whole = np.concatenate([tokens[row, : lengths[row]], responses[row]])[None]
        logits = run(config, params, whole).astype(np.float64)[0, lengths[row] - 1 : -1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(found[row], log_probs[np.arange(NEW), responses[row]], atol=1e-5)


def test_sampled_tokens_equal_those_of_generate(make: Make) -> None:
    config, (tokens, lengths) = KINDS["mha"], prompts()
    params = make(config, 1)
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 1.0}
    sampled, _ = generate_exact(config, params, tokens[:8], lengths[:8], **options)
    plain = generate(config, params, tokens[:8], lengths[:8], **options, seeds=np.arange(8))
    np.testing.assert_array_equal(sampled, np.asarray(plain))


def test_wrong_responses_are_refused(make: Make) -> None:
    config, (tokens, lengths) = KINDS["mha"], prompts()
    with pytest.raises(ValueError, match=r"tile: got 0") as error:
        generate_exact(
            config, make(config, 1), tokens, lengths, max_new_tokens=NEW, tile=0,
            responses=np.full((ROWS, NEW), 11, np.int32),
        )  # fmt: skip
    assert "responses: got shape [32, 12] with ids from 0 to 11" in str(error.value)


def test_an_empty_request_gives_an_empty_result(make: Make) -> None:
    config, (tokens, lengths) = KINDS["mha"], prompts()
    found, log_probs = generate_exact(config, make(config, 1), tokens, lengths, max_new_tokens=0)
    assert found.shape == log_probs.shape == (ROWS, 0)
