"""Growing caches (on GPUs): the same tokens, and no loop inside of a decoding step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn import ContinuousBatcher, GPTConfig, generate, init, stream
from tjx_nn.attention import kv_cache as caches
from tjx_nn.binding import Params
from tjx_nn.generation import autoregressive, continuous_batching, decoding_loop
from tjx_nn.generation.decode_weights import make_decode_weights

# The first row fills its bucket, so that caches have no spare slot when they grow.
PROMPT = np.array([range(1, 17), [6, *[0] * 15]], np.int32)
LENGTHS = np.array([16, 1], np.int32)
NEW = 64
SIZES = (20, 40, 80)


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make caches grow on CPUs too, from few slots."""
    monkeypatch.setattr(caches, "_MIN_GPU_SLOTS", 20)
    for module in (decoding_loop, continuous_batching):
        monkeypatch.setattr(module, "params_platform", lambda _: "gpu")


@pytest.fixture(scope="module")
def config(tiny: GPTConfig) -> GPTConfig:
    """A ring buffer of 32 slots, more than the first size, and a block without a window."""
    return dataclasses.replace(tiny, max_seq_len=80, window=30, global_every=2)


@pytest.fixture(scope="module")
def params(config: GPTConfig, make: Callable[..., Params]) -> Params:
    return make(config)


@pytest.fixture(scope="module")
def wanted(config: GPTConfig, params: Params) -> np.ndarray:
    """Generated tokens with caches of their final size."""
    arrays = jax.device_put((PROMPT, LENGTHS))
    return np.asarray(generate(config, params, *arrays, max_new_tokens=NEW))


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_growing_caches_do_not_change_generated_tokens(
    config: GPTConfig, params: Params, wanted: np.ndarray
) -> None:
    arrays = jax.device_put((PROMPT, LENGTHS))
    found, log_probs = generate(config, params, *arrays, max_new_tokens=NEW, return_log_probs=True)
    np.testing.assert_array_equal(np.asarray(found), wanted)
    assert np.all(np.asarray(log_probs) < 0)  # every column is written
    streamed = stream(config, params, *arrays, max_new_tokens=NEW, tokens_per_call=9)
    np.testing.assert_array_equal(np.stack(list(streamed), 1), wanted)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_slots_grow_with_the_longest_sequence(
    config: GPTConfig, params: Params, wanted: np.ndarray
) -> None:
    decoder = ContinuousBatcher(config, params, slots=2)
    found, rooms = [], []
    for row, length in enumerate(LENGTHS):
        first = decoder.join(row, PROMPT[row, :length].tolist(), max_new_tokens=NEW)
        found.append([int(first.token[0])])
    for _ in range(NEW - 1):
        tokens = np.asarray(decoder.step([True, True]).token)
        rooms.append(jax.tree.leaves(decoder._state.cache[1])[0].shape[1])
        for row in range(2):
            found[row].append(int(tokens[row]))
    np.testing.assert_array_equal(found, wanted)
    assert tuple(dict.fromkeys(rooms)) == SIZES
    assert rooms.index(40) == SIZES[0] - LENGTHS[0]  # the step that writes the token after them


def test_a_decode_step_on_a_gpu_has_no_loop() -> None:
    """Generation has one loop over tokens for each cache size, without loops inside."""
    config = GPTConfig(vocab_size=23, max_seq_len=4096, n_layer=2, n_head=4, n_kv_head=2, d_model=8)
    sizes = caches.cache_sizes(4096, "gpu")
    assert sizes == (1024, 2048, 4096)
    shapes: Any = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params = jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
    request = decoding_loop.make_request(
        config, params, PROMPT, LENGTHS, 4000, {"temperature": 1.0, "top_k": 5, "seeds": LENGTHS}
    )

    def loops(platform: str, sizes: tuple[int, ...]) -> int:
        traced: Any = autoregressive._generate.trace(
            make_decode_weights(config, params), request, config=config, capacity=4000, sizes=sizes,
            with_log_probs=False,
            samples=1,
        )  # fmt: skip
        text: str = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.while")

    assert loops("cuda", sizes) == len(sizes)
    # On CPUs the attention of each layer loops over filled slots.
    assert loops("cpu", (4096,)) > 1
