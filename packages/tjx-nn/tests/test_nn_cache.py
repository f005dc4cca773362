"""KV cache: ring buffers give the logits of the whole sequence in the memory of a window."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_nn import GPTConfig, LatentConfig, bind, generate
from tjx_nn.attention.kv_cache import (
    cache_slots,
    cached_attention,
    prefill_cache,
    select_rows,
    slot_positions,
    update_cache,
)
from tjx_nn.binding import Params
from tjx_nn.generation.prompt import Prompt, read_prompt

Run = Callable[..., np.ndarray]
Make = Callable[..., Params]
LENGTHS = np.array([30, 1, 9], np.int32)


def test_slots_contain_their_newest_position() -> None:
    newest = np.array([0, 3, 4, 11], np.int32)
    found = np.asarray(jax.jit(slot_positions, static_argnums=1)(jax.device_put(newest), 4))
    expected = [[0, -3, -2, -1], [0, 1, 2, 3], [4, 1, 2, 3], [8, 9, 10, 11]]
    np.testing.assert_array_equal(found, expected)


def test_tokens_are_written_to_the_slots_of_their_positions() -> None:
    rows = 5
    held = {"a": np.zeros((rows, 4, 3), np.float32), "b": np.zeros((rows, 6), np.float32)}
    new = {"a": np.ones((rows, 2, 3), np.float32), "b": np.full((rows, 2), 2, np.float32)}
    positions = 3 * np.arange(rows, dtype=np.int32)[:, None] + np.arange(2, dtype=np.int32)
    found = jax.device_get(jax.jit(update_cache)(*jax.device_put((held, new, positions))))
    for b in range(rows):
        for t in range(2):
            held["a"][b, positions[b, t] % 4], held["b"][b, positions[b, t] % 6] = 1, 2
    for name, expected in held.items():
        np.testing.assert_array_equal(found[name], expected)


def test_the_last_tokens_of_a_prompt_are_cached() -> None:
    entries = {"x": np.tile(np.arange(8.0, dtype=np.float32), (2, 1))}
    keep = jax.jit(prefill_cache, static_argnums=2)
    on_device = jax.device_put((entries, np.array([7, 2], np.int32)))
    few = np.asarray(keep(*on_device, 4)["x"])
    np.testing.assert_array_equal(few[0], [4, 5, 6, 3])
    np.testing.assert_array_equal(few[1, :2], [0, 1])
    many = np.asarray(keep(*on_device, 10)["x"])
    np.testing.assert_array_equal(many, np.pad(entries["x"], ((0, 0), (0, 2))))


def test_row_selection_leaves_source_entries_unchanged() -> None:
    x = np.arange(4.0, dtype=np.float32).reshape(2, 2)
    rows = np.array([1, 1], np.int32)
    cache = jax.jit(select_rows)(*jax.device_put(([{"self": {"k": x}, "cross": {"k": x}}], rows)))
    np.testing.assert_array_equal(np.asarray(cache[0]["self"]["k"]), x[[1, 1]])
    np.testing.assert_array_equal(np.asarray(cache[0]["cross"]["k"]), x)


def test_reading_all_slots_at_once_equals_reading_chunks() -> None:
    """Platforms other than CPUs read all slots; positions differ between ragged rows."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(0, 1, shape).astype(np.float32)
        for shape in ((3, 2, 4, 8), (3, 300, 2, 8), (3, 300, 2, 6))
    )
    positions = np.array([[0, 1], [254, 255], [298, 299]], np.int32)
    slopes, sinks = np.array([[0.5, 0.1, 0.02, 0.0], [-1, 0, 2, 4]], np.float32)
    on_device = jax.device_put((q, k, v, positions, {"alibi_slopes": slopes, "sinks": sinks}))

    @jax.jit
    def both(q: Any, k: Any, v: Any, positions: Any, of_heads: Any) -> Any:
        given: dict[str, Any] = {"scale": 0.3, "soft_cap": 5.0, **of_heads}
        whole = cached_attention(q, k, v, positions, window=300, **given)
        # The last query 7 positions later, in a full ring buffer.
        later = (q[2:, 1:], jnp.roll(k[2:], 7, 1), jnp.roll(v[2:], 7, 1), positions[2:, 1:] + 7)
        ring = cached_attention(*later, window=300, **given)
        # A window larger than the cache hides nothing.
        runs = [cached_attention(q, k, v, positions, window=w, **given) for w in (None, 301)]
        return whole, ring, *runs

    at_once, ring, *by_runs = jax.device_get(both(*on_device))
    np.testing.assert_allclose(at_once, by_runs[0], atol=1e-5)
    np.testing.assert_allclose(ring, at_once[2:, 1:], atol=1e-5)
    np.testing.assert_array_equal(*by_runs)


# Windows of exactly 16 slots, without a spare slot for several new tokens, and others.
KINDS: dict[str, dict[str, Any]] = {
    "every third block global": {"window": 5, "global_every": 3, "n_layer": 3},
    "alibi": {"window": 5, "positions": "alibi", "attention_soft_cap": 4.0},
    "rope": {"window": 16, "positions": "rope", "qk_norm": True},
    "chunks": {
        "window": 7, "chunked_window": True, "positions": "rope", "nope_every": 2,
        "nope_temperature": 0.5, "nope_temperature_length": 4,
    },
    "latent": {
        "window": 16, "n_kv_head": None, "positions": "rope",
        "latent": LatentConfig(kv_dim=8, rope_dim=4),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "new"), [(kind, 1) for kind in KINDS] + [("rope", 3), ("chunks", 3)]
)
def test_windowed_decoding_of_ragged_rows_equals_the_plain_model(
    tiny: GPTConfig, make: Make, run: Run, kind: str, new: int
) -> None:
    config = dataclasses.replace(tiny, max_seq_len=64, **KINDS[kind])
    params, steps = make(config), 27
    tokens = np.random.default_rng(0).integers(0, 23, (3, 64), np.int32)

    @jax.jit
    def decode_all(params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        model = bind(config, params)
        blocks = model.unstacked_blocks()
        first, cache = read_prompt(model, blocks, Prompt(tokens[:, :32], lengths), 64, new)

        def step(cache: Any, index: jax.Array) -> Any:
            positions = (lengths + new * index)[:, None] + jnp.arange(new)[None]
            fed = jnp.take_along_axis(tokens, positions, 1)
            logits, cache = model.decode(blocks, fed, positions, cache)
            return cache, logits

        _, logits = jax.lax.scan(step, cache, jnp.arange(steps // new))
        rest = logits.swapaxes(0, 1).reshape(len(lengths), -1, logits.shape[-1])
        return jnp.concatenate([first[:, None], rest], 1)

    found = np.asarray(decode_all(params, *jax.device_put((tokens, LENGTHS))))
    whole = run(config, params, tokens)
    for row, length in enumerate(LENGTHS):
        expected = whole[row, length - 1 : length + steps // new * new]
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_memory_of_windowed_blocks_does_not_grow_with_the_sequence(tiny: GPTConfig) -> None:
    config = dataclasses.replace(tiny, max_seq_len=4096, window=20, global_every=3, n_layer=3)
    assert cache_slots(config, 4096) == (32, 32, 4096)
    assert cache_slots(config, 4096, new=14) == (48, 48, 4096)
    assert cache_slots(config, 24) == (24, 24, 24)
    assert cache_slots(dataclasses.replace(config, window=None), 512) == (512, 512, 512)


def test_generation_continues_far_beyond_the_window(tiny: GPTConfig, make: Make, run: Run) -> None:
    config = dataclasses.replace(tiny, max_seq_len=64, window=5, positions="rope")
    params = make(config)
    prompt = np.random.default_rng(1).integers(0, 23, (3, 30), np.int32)
    new = np.asarray(generate(config, params, prompt, LENGTHS, max_new_tokens=34))
    for row, length in enumerate(LENGTHS):
        whole = np.zeros((3, 64), np.int32)
        whole[0, : length + 34] = [*prompt[row, :length], *new[row]]
        greedy = run(config, params, whole)[0].argmax(-1)
        np.testing.assert_array_equal(new[row], greedy[length - 1 : length + 33])
