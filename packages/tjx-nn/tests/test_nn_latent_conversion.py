"""Conversion to latent attention: equal logits at full rank, and the error of smaller ranks."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn import (
    ExpertsConfig,
    GPTConfig,
    LatentConfig,
    RopeConfig,
    SparseConfig,
    bind,
    cache_bytes,
    count_params,
    generate,
    init,
    quantize,
    to_latent_attention,
)
from tjx_nn.binding import Params

SIZES: dict[str, Any] = {
    "vocab_size": 17, "max_seq_len": 16, "n_layer": 2, "n_head": 4, "d_model": 16,
}  # fmt: skip
YARN = RopeConfig(base=20.0, scaling="yarn", factor=4.0, original_seq_len=8)
CONFIGS = {
    "MHA, learned": GPTConfig(**SIZES),
    "GQA, ALiBi": GPTConfig(
        **SIZES, n_kv_head=2, positions="alibi", attention_soft_cap=2.0, mup_base=8, bias=False
    ),
    "MHA, RoPE, window": GPTConfig(**SIZES, positions="rope", window=5, norm="rmsnorm"),
    "GQA, RoPE, biases of queries, keys and values": GPTConfig(
        **SIZES, n_kv_head=2, positions="rope", bias=False, qkv_bias=True, attention_scale=0.4,
        rope=RopeConfig(base=50.0, interleaved=True), d_head=6,
    ),
    "GQA, RoPE of a part of the features, YaRN, experts": GPTConfig(
        **SIZES, n_kv_head=2, positions="rope", rope=dataclasses.replace(YARN, dim=2),
        experts=ExpertsConfig(count=2, first_layer=1),
    ),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 12), np.int32)


@functools.cache
def make_params(config: GPTConfig) -> Params:
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params: Params = jax.tree.map(
        lambda p: (0.4 * rng.standard_normal(p.shape)).astype(np.float32), shapes
    )
    return params


@functools.partial(jax.jit, static_argnums=0)
def jitted_logits(config: GPTConfig, params: Params, tokens: jax.Array) -> jax.Array:
    return bind(config, params)(tokens)


def logits(config: GPTConfig, params: Params) -> np.ndarray:
    result: np.ndarray = jax.device_get(jitted_logits(config, *jax.device_put((params, TOKENS))))
    return result


@pytest.mark.parametrize("name", CONFIGS)
def test_the_full_rank_has_the_logits_of_the_model(name: str) -> None:
    config = CONFIGS[name]
    params = make_params(config)
    new, converted = to_latent_attention(config, params)
    expected = logits(config, params)
    np.testing.assert_allclose(logits(new, converted), expected, atol=2e-5 * abs(expected).max())
    assert sum(p.size for p in jax.tree.leaves(converted)) == count_params(new)
    assert cache_bytes(new, 3) <= cache_bytes(config, 3)


def test_the_block_of_multi_token_prediction_is_converted_too() -> None:
    config = dataclasses.replace(CONFIGS["MHA, RoPE, window"], multi_token_loss=0.3)
    params = make_params(config)

    @functools.partial(jax.jit, static_argnums=0)
    def loss(config: GPTConfig, params: Params, tokens: jax.Array) -> jax.Array:
        return bind(config, params).losses(tokens, tokens).penalty

    models = ((config, params), to_latent_attention(config, params))
    expected, found = (
        jax.device_get(loss(each, *jax.device_put((p, TOKENS)))) for each, p in models
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_decoding_with_the_latent_cache_writes_the_same_text() -> None:
    for name in ("MHA, learned", "GQA, RoPE, biases of queries, keys and values"):
        config = CONFIGS[name]
        params = make_params(config)
        new, converted = to_latent_attention(config, params)
        prompt, lengths = TOKENS[:, :4], np.array([4, 3], np.int32)
        expected, found = (
            jax.device_get(generate(each, *jax.device_put((p, prompt, lengths)), max_new_tokens=6))
            for each, p in ((config, params), (new, converted))
        )
        np.testing.assert_array_equal(found, expected)


def test_proportional_key_heads_need_one_rotated_head() -> None:
    config = CONFIGS["GQA, RoPE, biases of queries, keys and values"]
    params = jax.tree.map(np.copy, make_params(config))
    for leaf in params["blocks"]["attention"]["key"].values():
        leaf[..., 6:] = -3 * leaf[..., :6]
    new, converted = to_latent_attention(config, params, rope_heads=1)
    assert new.latent.rope_dim == 6
    expected = logits(config, params)
    np.testing.assert_allclose(logits(new, converted), expected, atol=2e-5 * abs(expected).max())


def test_a_smaller_rank_keeps_the_leading_singular_vectors() -> None:
    config = dataclasses.replace(CONFIGS["MHA, learned"], bias=False)
    params = make_params(config)
    attention = params["blocks"]["attention"]
    _, converted = to_latent_attention(config, params, 5)
    found = converted["blocks"]["attention"]
    for layer in range(2):
        parts = [attention[name]["kernel"][layer].astype(np.float64) for name in ("key", "value")]
        norms = [np.linalg.norm(part) for part in parts]
        u, s, vt = np.linalg.svd(np.hstack([p / n for p, n in zip(parts, norms, strict=True)]))
        best = np.split(u[:, :5] * s[:5] @ vt[:5], 2, 1)
        down = found["kv_down"]["kernel"][layer]
        for name, expected, norm in zip(("key_up", "value_up"), best, norms, strict=True):
            product = down @ found[name]["kernel"][layer]
            np.testing.assert_allclose(product, norm * expected, atol=1e-5)


def test_the_error_grows_as_rank_and_rotated_heads_shrink() -> None:
    config = CONFIGS["MHA, RoPE, window"]
    params = make_params(config)
    expected = logits(config, params)

    def error(rank: int | None, rope_heads: int | None) -> float:
        return float(
            abs(
                logits(*to_latent_attention(config, params, rank, rope_heads=rope_heads)) - expected
            ).mean()
        )

    assert error(16, 4) < error(8, 4) < error(2, 4)
    assert error(16, 4) < error(16, 3) < error(16, 1)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"qk_norm": True}, {}, "qk_norm: got True"),
    ({"attention_sinks": True}, {}, "attention_sinks: got True"),
    ({"positions": "rope", "nope_every": 2}, {}, "nope_every: got 2"),
    ({"positions": "rope", "rope": RopeConfig(local_base=9.0)}, {}, "rope.local_base: got 9.0"),
    ({"latent": LatentConfig(kv_dim=4)}, {}, "latent.kv_dim: got 4"),
    ({"sparse": SparseConfig(top_k=4)}, {}, "sparse.top_k: got 4"),
    ({}, {"rank": 17}, "rank: got 17; expected 1 to 16"),
    ({"positions": "rope", "n_kv_head": 2}, {"rank": 9}, "rank: got 9; expected 1 to 8"),
    ({"positions": "rope"}, {"rope_heads": 5}, "rope_heads: got 5; expected 1 to 4"),
    ({}, {"rope_heads": 1}, "rope_heads: got 1; expected None without"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "arguments", "message"), REFUSED)
def test_refuses_what_latent_attention_cannot_compute(
    options: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        to_latent_attention(GPTConfig(**SIZES, **options), {}, **arguments)


def test_refuses_quantized_kernels() -> None:
    config = CONFIGS["MHA, learned"]
    params = jax.jit(quantize, static_argnums=0)(config, jax.device_put(make_params(config)))
    with pytest.raises(ValueError, match="convert first, then quantize"):
        to_latent_attention(config, params)
