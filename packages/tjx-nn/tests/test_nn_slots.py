"""Continuous batching: the tokens of a sequence do not depend on the other slots."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn import ContinuousBatcher, GPTConfig, generate
from tjx_nn.binding import Params

NEW = 6
# Options of each sequence; there are more sequences than slots.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 2.0, "seed": 2**32 - 1, "top_k": 5},
    {"temperature": 1.0, "seed": -1, "top_p": 0.7, "log_probs": True},
    {"repetition_penalty": 2.5},
    {"temperature": 1.5, "seed": 3, "min_p": 0.2, "repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 4, "log_probs": True},
]
PROMPTS = [[5], [1, 2, 3], [7] * 17, [4, 4], [9, 8, 7, 6], [2] * 20, [1, 2, 3]]


@pytest.fixture(scope="module")
def config(tiny: GPTConfig) -> GPTConfig:
    # One block without a window and one with a ring buffer.
    return dataclasses.replace(tiny, max_seq_len=64, window=4, global_every=2)


@pytest.fixture(scope="module")
def params(config: GPTConfig, make: Callable[..., Params]) -> Params:
    params = jax.device_get(make(config))
    # Without strong positions a random model repeats one token, which tests nothing.
    params["wpe"]["embedding"] = 20 * params["wpe"]["embedding"]
    on_device: Params = jax.device_put(params)
    return on_device


def alone(config: GPTConfig, params: Params, row: int) -> tuple[list[int], list[float]]:
    # Neutral values, so that all sequences share a program.
    neutral = {"top_k": 23, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    options = {**neutral, **OPTIONS[row]}
    options.pop("log_probs", None)
    seed = np.array([options.pop("seed", 0)], np.int64)
    tokens, log_probs = generate(
        config,
        params,
        np.array([PROMPTS[row]], np.int32),
        np.array([len(PROMPTS[row])], np.int32),
        max_new_tokens=NEW,
        return_log_probs=True,
        seeds=seed,
        **options,
    )
    return np.asarray(tokens)[0].tolist(), np.asarray(log_probs)[0].tolist()


def together(config: GPTConfig, params: Params) -> dict[int, list[Any]]:
    """Generate all sequences with three slots; they join and leave at different steps."""
    decoder = ContinuousBatcher(config, params, slots=3, max_len=40)
    waiting = list(range(len(PROMPTS)))
    inside: dict[int, int] = {}
    made: dict[int, list[Any]] = {}
    turn = 0
    while waiting or inside:
        for slot in range(3):
            # The third slot is empty for two steps.
            if slot not in inside and waiting and (slot < 2 or turn >= 2):
                row = waiting.pop(0)
                inside[slot] = row
                chosen = decoder.join(slot, PROMPTS[row], max_new_tokens=NEW, **OPTIONS[row])
                made[row] = [jax.tree.map(lambda x: x[0], jax.device_get(chosen))]
        chosen = jax.device_get(decoder.step([slot in inside for slot in range(3)]))
        for slot, row in list(inside.items()):
            made[row].append(jax.tree.map(lambda x, slot=slot: x[slot], chosen))
            if len(made[row]) == NEW:
                del inside[slot]
        turn += 1
    return made


def test_tokens_do_not_depend_on_other_sequences(config: GPTConfig, params: Params) -> None:
    found = together(config, params)
    for row, options in enumerate(OPTIONS):
        tokens, log_probs = alone(config, params, row)
        assert [int(each.token) for each in found[row]] == tokens, options
        if options.get("log_probs"):
            np.testing.assert_allclose(
                [each.log_prob for each in found[row]], log_probs, atol=1e-5, rtol=1e-5
            )
            for each in found[row]:
                assert (np.diff(each.top_log_probs) <= 0).all()
                if each.token in each.top_tokens:
                    place = each.top_tokens.tolist().index(each.token)
                    np.testing.assert_allclose(each.top_log_probs[place], each.log_prob, atol=1e-6)
    assert len({tuple(int(each.token) for each in row) for row in found.values()}) > 4


def test_decoding_steps_share_one_program(config: GPTConfig, params: Params) -> None:
    decoder = ContinuousBatcher(
        config, params, slots=3, max_len=40
    )  # compiled by the previous test
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    decoder.join(0, [3, 4], max_new_tokens=3, temperature=0.3, top_k=2, seed=8)
    decoder.step([True, False, False])
    decoder.join(2, [3] * 9, max_new_tokens=3)
    decoder.step([True, False, True])
    assert not compiled


def test_a_sequence_beyond_its_slot_raises(config: GPTConfig, params: Params) -> None:
    decoder = ContinuousBatcher(config, params, slots=3, max_len=40)
    with pytest.raises(ValueError, match="at most 40, the size of a slot") as error:
        decoder.join(0, [1] * 38, max_new_tokens=3, temperature=-1.0, top_k=0, seed=2**40)
    for part in ("temperature: got -1.0", "top_k: got 0", "seed: got 1099511627776"):
        assert part in str(error.value)
    decoder.join(0, [1] * 37, max_new_tokens=3)
    with pytest.raises(ValueError, match="slots: got 0"):
        ContinuousBatcher(config, params, slots=0)
    with pytest.raises(ValueError, match="max_len: got 65; expected 1 to max_seq_len 64"):
        ContinuousBatcher(config, params, slots=1, max_len=65)
