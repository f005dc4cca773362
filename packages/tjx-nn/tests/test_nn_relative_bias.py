"""Learned bias of relative positions: buckets, positions, windows and rematerialization."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from tjx_nn import EncoderDecoderConfig, bind, generate
from tjx_nn.binding import Params
from tjx_nn.layers.relative_bias import RelativeBias

GOLDEN = pathlib.Path(__file__).parent / "golden" / "t5" / "golden.npz"
CONFIG = EncoderDecoderConfig(
    vocab_size=23, max_seq_len=24, n_layer=2, n_encoder_layer=1, n_head=4, n_kv_head=2, d_model=16,
    positions="none", norm_position="pre", relative_buckets=6, relative_max_distance=9,
    init_std=0.5,
)  # fmt: skip
A, T = 7, 12  # tokens of the first document and of a row

Make = Callable[..., Params]
Run = Callable[..., np.ndarray]


@pytest.fixture
def texts() -> tuple[np.ndarray, np.ndarray]:
    source, tokens = np.random.default_rng(0).integers(3, 23, (2, 1, T), np.int32)
    return source, tokens


@pytest.mark.parametrize("sizes", [(32, 128), (8, 12), (10, 33)])
@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_those_of_transformers(sizes: tuple[int, int], causal: bool) -> None:
    with np.load(GOLDEN) as file:
        expected = file[f"buckets/{sizes[0]}/{sizes[1]}/{int(not causal)}"]
    with jax.transfer_guard("allow"):
        layer = RelativeBias(1, *sizes, causal=causal, rngs=nnx.Rngs(0))
        layer.embedding[...] = jax.numpy.arange(float(sizes[0]))[:, None]
        found = layer(jax.numpy.array([[150]]), jax.numpy.arange(301)[None])
    assert len(expected) == 301  # distances from -150 to 150
    np.testing.assert_array_equal(np.asarray(found)[0, 0, 0], expected)


def test_only_differences_of_positions_matter(
    texts: tuple[np.ndarray, np.ndarray], make: Make, run: Run
) -> None:
    """Of packed rows, which test_nn_invariance.py compares with separate ones."""
    params = make(CONFIG)
    segments = np.where(np.arange(T) < A, 5, 2)[None].astype(np.int32)
    ids = {"segment_ids": segments, "source_segment_ids": segments}
    counted = run(CONFIG, params, *texts, **ids)
    positions = np.concatenate([np.arange(A), np.arange(T - A)])[None].astype(np.int32)
    given = {"positions": positions + 3, "source_positions": positions + 5}
    np.testing.assert_allclose(run(CONFIG, params, *texts, **ids, **given), counted, atol=1e-5)
    for name in given:
        other = run(CONFIG, params, *texts, **ids, **(given | {name: 2 * positions}))
        assert np.abs(other - counted).max() > 1e-3


def test_windows_and_ring_buffers_have_the_bias_too(
    texts: tuple[np.ndarray, np.ndarray], make: Make, run: Run
) -> None:
    """Generation past the window of every second block equals the forward pass."""
    config = dataclasses.replace(CONFIG, window=4, global_every=2, attention_soft_cap=3.0)
    params, (source, tokens) = make(config), texts
    prompt = jax.device_put((params, tokens[:, :3], np.array([3], np.int32)))
    new, said = jax.device_get(
        generate(config, *prompt, max_new_tokens=20, return_log_probs=True, source=source)
    )
    whole = np.concatenate([tokens[:, :3], new], 1)
    logits = run(config, params, source, whole)[0, 2:-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(said[0], expected[np.arange(20), new[0]], atol=1e-5)


def test_loops_and_rematerialization_have_equal_gradients(
    texts: tuple[np.ndarray, np.ndarray], make: Make
) -> None:
    def gradient(options: dict[str, Any]) -> Params:
        config = dataclasses.replace(CONFIG, **options)

        @jax.jit
        def compute(params: Params, source: jax.Array, tokens: jax.Array) -> Params:
            def loss(params: Params) -> jax.Array:
                return bind(config, params).losses(source, tokens, tokens).tokens.mean()

            gradients: Params = jax.grad(loss)(params)
            return gradients

        found: Params = jax.device_get(compute(make(CONFIG), *jax.device_put(texts)))
        return found

    unrolled = gradient({"scan_layers": False})
    for name in ("relative_bias", "encoder_relative_bias"):
        assert np.abs(unrolled[name]["embedding"]).max() > 1e-3
    again = gradient({"scan_layers": True, "remat": "full"})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), again, unrolled)
