"""Generation in slots that are refilled: the tokens of all rows at once, in the expected steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn import GPTConfig, generate
from tjx_nn.binding import Params
from tjx_nn.generation import autoregressive
from tjx_nn.generation.slots import generate_in_slots, slot_steps

STOP = [3, 5]
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 30, "samples": 4, "stop_token": STOP, "temperature": 2.0,
    "return_log_probs": True,
}  # fmt: skip


@pytest.mark.parametrize("window", [None, 5])
def test_rows_in_slots_have_the_tokens_of_rows_at_once(
    window: int | None,
    tiny: GPTConfig,
    make: Callable[..., Params],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[int] = []

    def count(*arguments: Any, **options: Any) -> Any:
        found = generate_in_slots(*arguments, **options)
        steps.append(int(jax.device_get(found[2])))
        return found

    monkeypatch.setattr(autoregressive, "generate_in_slots", count)
    config = dataclasses.replace(tiny, max_seq_len=64, window=window, global_every=2)
    params = jax.device_put(jax.tree.map(lambda p: 4 * p, jax.device_get(make(config, 1))))
    draw = np.random.default_rng(0)
    prompts = draw.integers(0, 23, (6, 9), np.int32), draw.integers(1, 10, 6).astype(np.int32)
    options = {**OPTIONS, "seeds": np.arange(24) + 7}
    if window is None:
        options["repetition_penalty"] = 1.2
    tokens, log_probs = jax.device_get(generate(config, params, *prompts, **options))
    found, found_log_probs = jax.device_get(generate(config, params, *prompts, slots=5, **options))
    np.testing.assert_array_equal(found, tokens)
    # The program has other shapes, and so another order of summation.
    np.testing.assert_allclose(found_log_probs, log_probs, atol=1e-5)
    is_end = np.isin(tokens, STOP)
    lengths = np.where(is_end.any(1), is_end.argmax(1) + 1, 30)
    assert len(np.unique(lengths)) > 5
    assert lengths.min() == 1 or window  # a row that takes no slot
    assert steps == [slot_steps(lengths.tolist(), 5)]
    assert 5 * steps[0] < 24 * (lengths.max() - 1)


def test_slots_that_sharding_does_not_divide_are_named(
    tiny: GPTConfig, make: Callable[..., Params]
) -> None:
    prompts = np.zeros((2, 1), np.int32), np.ones(2, np.int32)
    with pytest.raises(ValueError, match="slots: got 0; expected at least 1"):
        generate(tiny, make(tiny), *prompts, max_new_tokens=1, slots=0)
    assert slot_steps([3, 9, 3, 3, 2, 2], slots=2, shards=2) == 12
