"""Int8 KV cache: attention to rounded entries, and the memory, values and users of the cache."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_nn import (
    ContinuousBatcher,
    GPTConfig,
    LatentConfig,
    beam_search,
    bind,
    cache_bytes,
    generate,
    stream,
)
from tjx_nn.attention.int8_entries import Int8Entries
from tjx_nn.attention.kv_cache import cached_attention, quantize_cache
from tjx_nn.binding import Params
from tjx_nn.generation.prompt import Prompt, read_prompt

Make = Callable[..., Params]


@pytest.fixture(scope="module")
def int8(tiny: GPTConfig) -> GPTConfig:
    return dataclasses.replace(tiny, kv_cache_dtype="int8", max_seq_len=64)


def test_entries_are_rounded_for_each_token_and_head() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 8)).astype(np.float32)
    x[0, 1, 1] = 0
    nested = {"self": {"key": x}, "cross": {"key": x}}
    found = jax.device_get(jax.jit(quantize_cache)(jax.device_put(nested)))
    entries = found["self"]["key"]
    np.testing.assert_array_equal(found["cross"]["key"], x)
    scale = np.abs(x).max(-1) / 127
    error = np.abs(entries.values * entries.scale[..., None].astype(np.float64) - x)
    assert (error <= scale[..., None] * 0.5 * (1 + 1e-4)).all()
    assert np.abs(entries.values).max(-1).tolist()[0][1] == [127, 0]


@pytest.mark.parametrize(("new", "groups"), [(1, 1), (2, 2)])
def test_attention_is_that_to_the_rounded_entries(new: int, groups: int) -> None:
    """All slots at once (a window), and in chunks."""
    draw = np.random.default_rng(0)
    q = draw.normal(size=(3, new, 2 * groups, 8)).astype(np.float32)
    values = draw.integers(-127, 128, (2, 3, 300, 2, 8), np.int8)
    scale = draw.uniform(0.005, 0.02, values.shape[:4]).astype(np.float32)
    positions = np.array([[1], [200], [299]], np.int32) + np.arange(1 - new, 1, dtype=np.int32)

    @jax.jit
    def both(q: Any, values: Any, scale: Any, positions: Any) -> Any:
        def attend(k: Any, v: Any) -> list[jax.Array]:
            return [
                cached_attention(q, k, v, positions, window=window, scale=0.3)
                for window in (300, None)
            ]

        entries = [Int8Entries(values[i], scale[i]) for i in range(2)]
        return attend(*entries), attend(*(e.values * e.scale[..., None] for e in entries))

    found, expected = jax.device_get(both(*jax.device_put((q, values, scale, positions))))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("value_mix", ["none", "embedding"])
def test_the_cache_has_int8_values_and_close_logits(
    tiny: GPTConfig, int8: GPTConfig, make: Make, value_mix: Literal["none", "embedding"]
) -> None:
    tiny, int8 = (dataclasses.replace(each, value_mix=value_mix) for each in (tiny, int8))
    params = make(int8)
    tokens = jax.device_put(np.random.default_rng(0).integers(0, 23, (2, 8), np.int32))

    def logits(config: GPTConfig) -> Any:
        @jax.jit
        def run(params: Params, tokens: jax.Array) -> Any:
            model = bind(config, params)
            blocks = model.unstacked_blocks()
            prompt = Prompt(tokens[:, :7], jnp.full(2, 7))
            _, cache = read_prompt(model, blocks, prompt, 20)
            return model.decode(blocks, tokens[:, 7:], jnp.full((2, 1), 7), cache)

        return jax.device_get(run(params, tokens))

    plain = dataclasses.replace(tiny, max_seq_len=64)
    (found, cache), (expected, _) = logits(int8), logits(plain)
    assert 0 < np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert {x.dtype.name for x in jax.tree.leaves(cache)} == {"int8", "float32"}
    assert cache[0]["key"].values.shape == (2, 20, int8.kv_heads, int8.head_dim)
    # A float32 scale for the features of a head, each a byte.
    ratio = (int8.head_dim + 4) / (4 * int8.head_dim)
    assert cache_bytes(int8, 20) == ratio * cache_bytes(plain, 20)


def test_all_generators_share_the_int8_cache(int8: GPTConfig, make: Make) -> None:
    params = make(int8)
    prompt, lengths = jax.device_put((np.array([[3, 1, 4, 1, 5]], np.int32), np.array([5])))
    given: Any = (int8, params, prompt, lengths)
    expected = np.asarray(generate(*given, max_new_tokens=8))[0].tolist()
    found = [int(token[0]) for token in stream(*given, max_new_tokens=8)]
    beams, _ = beam_search(*given, beams=1, max_new_tokens=8)
    batcher = ContinuousBatcher(int8, params, slots=2)
    batched = [batcher.join(1, [3, 1, 4, 1, 5], max_new_tokens=8).token]
    batched += [batcher.step([False, True]).token for _ in range(7)]
    assert found == expected
    assert np.asarray(beams)[0, 0].tolist() == expected
    assert [int(jax.device_get(token)[-1]) for token in batched] == expected


def test_latent_attention_has_no_int8_cache(tiny: GPTConfig) -> None:
    latent = LatentConfig(kv_dim=8)
    with pytest.raises(ValueError, match="kv_cache_dtype: got 'int8' with latent"):
        dataclasses.replace(tiny, n_kv_head=None, latent=latent, kv_cache_dtype="int8")
