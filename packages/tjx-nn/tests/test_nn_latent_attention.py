"""Latent attention against explicit keys and values of every head, in float64."""

import dataclasses
import functools
from typing import Any

import attention_layers
import jax
import numpy as np
import pytest
from attention_layers import T, abstract, at, decode
from flax import nnx

from tjx_nn import GPTConfig, LatentConfig, RopeConfig, count_params
from tjx_nn.attention.kv_cache import KVCache
from tjx_nn.binding import Params
from tjx_nn.inputs import TokenMetadata

TINY = GPTConfig(
    n_layer=1, n_head=3, d_model=12, d_head=6, max_seq_len=16, positions="rope",
    latent=LatentConfig(kv_dim=5, rope_dim=4, v_dim=7),
    rope=RopeConfig(base=50.0, interleaved=True),
)  # fmt: skip
# Latent queries, all biases, and all options that change scores.
RICH = dataclasses.replace(
    TINY, positions="alibi", attention_soft_cap=2.0, norm="rmsnorm", mup_base=6,
    latent=dataclasses.replace(TINY.latent, q_dim=8),
)  # fmt: skip
make_params = functools.partial(attention_layers.make_params, scale=0.5)
inputs = functools.partial(attention_layers.inputs, features=12)


@functools.partial(jax.jit, static_argnames=("config", "window"))
def apply(
    config: GPTConfig,
    params: Params,
    x: jax.Array,
    metadata: TokenMetadata,
    window: int | None = None,
) -> tuple[jax.Array, KVCache]:
    layer = nnx.merge(abstract(config)[0], params)
    result: tuple[jax.Array, KVCache] = layer(x, *metadata, window=window)[:2]
    return result


def turned(x: np.ndarray, base: float) -> np.ndarray:
    """RoPE of [tokens, features] by complex numbers, interleaved pairs."""
    tokens, dim = x.shape
    angles = np.arange(tokens)[:, None] * base ** -(np.arange(0, dim, 2) / dim)
    z = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def normed(x: np.ndarray, p: Any, config: GPTConfig) -> np.ndarray:
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_eps)
    y: np.ndarray = x * p["scale"] + p.get("bias", 0)
    return y


def oracle(
    config: GPTConfig, params: Params, x_BTD: np.ndarray, window: int | None = None
) -> np.ndarray:
    """Loop over rows and heads with explicit keys and values."""
    p = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    n, h, r, v = config.n_head, config.head_dim, config.latent.rope_dim, config.v_dim
    c = config.latent.kv_dim

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        y: np.ndarray = x @ p[name]["kernel"] + p[name]["bias"]
        return y

    out = []
    for x in x_BTD.astype(np.float64):
        distance = np.arange(len(x))[:, None] - np.arange(len(x))
        if config.latent.q_dim is None:
            q_all = linear("query", x)
        else:
            q_all = linear("query_up", normed(linear("query_down", x), p["query_norm"], config))
        down = linear("kv_down", x)
        latent = normed(down[:, :c], p["kv_norm"], config)
        keys, values = linear("key_up", latent), linear("value_up", latent)
        turn = functools.partial(turned, base=50.0) if config.positions == "rope" else lambda x: x
        heads = []
        for i in range(n):
            q = q_all[:, i * (h + r) : (i + 1) * (h + r)]
            q = np.concatenate([q[:, :h], turn(q[:, h:])], -1)
            k = np.concatenate([keys[:, i * h : (i + 1) * h], turn(down[:, c:])], -1)
            s = q @ k.T * (1 / np.sqrt(h + r) if config.mup_base is None else 8 / (h + r))
            if config.attention_soft_cap is not None:
                s = config.attention_soft_cap * np.tanh(s / config.attention_soft_cap)
            if config.positions == "alibi":
                s = s - [2.0**-4, 2.0**-8, 2.0**-2][i] * distance
            s[(distance < 0) | (distance >= (window or len(x)))] = -np.inf
            weights = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
            heads.append(weights @ values[:, i * v : (i + 1) * v])
        out.append(linear("out", np.concatenate(heads, -1)))
    return np.stack(out)


@pytest.mark.parametrize(("config", "window"), [(TINY, None), (RICH, 4)])
def test_equals_explicit_multi_head_attention(config: GPTConfig, window: int | None) -> None:
    params, x = make_params(config), inputs()
    placed = jax.device_put((params, x, at()))
    out, entries = jax.device_get(apply(config, *placed, window=window))
    np.testing.assert_allclose(out, oracle(config, params, x, window), atol=2e-5)
    assert {name: entry.shape for name, entry in entries.items()} == {
        "latent": (2, T, 5),
        "rope_key": (2, T, 4),
    }


@pytest.mark.parametrize(("config", "window"), [(TINY, None), (RICH, 4)])
def test_decoding_one_token_and_several_equals_the_full_pass(
    config: GPTConfig, window: int | None
) -> None:
    params, x = jax.device_put((make_params(config), inputs()))
    expected, entries = apply(config, params, x, at(), window=window)
    # Unused slots contain garbage.
    cache = {
        name: jax.device_put(np.full((2, 12, entry.shape[2]), 9, np.float32))
        for name, entry in entries.items()
    }
    expected, x = jax.device_get((expected, x))
    for start, stop in [(0, 3), (3, 6), (6, 7), (7, 8), (8, 9), (9, 10)]:
        new = jax.device_put((x[:, start:stop], cache, at(2, start, stop)))
        out, cache = decode(config, params, *new, window=window)
        np.testing.assert_allclose(jax.device_get(out), expected[:, start:stop], atol=1e-5)


def test_is_causal() -> None:
    params, x = jax.device_put((make_params(TINY), inputs(1)))
    metadata = at(1)

    @jax.jit
    def reach(x: jax.Array) -> jax.Array:
        jacobian: jax.Array = jax.jacrev(lambda x: apply(TINY, params, x, metadata)[0].sum((0, 2)))(
            x
        )
        return abs(jacobian[:, 0]).max(-1)

    seen = jax.device_get(reach(x)) > 0
    np.testing.assert_array_equal(seen, np.tri(T, dtype=bool))


def test_packed_documents_are_independent() -> None:
    params, x = jax.device_put((make_params(TINY), inputs()))
    ids = np.repeat(np.array([[1, 2], [7, 3]], np.int32), 5, axis=1)
    metadata = TokenMetadata(*jax.device_put((np.arange(T, dtype=np.int32)[None] % 5, ids)))
    packed, _ = apply(TINY, params, x, metadata)
    second = jax.device_put((jax.device_get(x)[:, 5:], at(1, 0, 5)))
    alone, _ = apply(TINY, params, *second)
    np.testing.assert_allclose(jax.device_get(packed)[:, 5:], jax.device_get(alone), atol=1e-5)


def test_parameter_count_equals_the_formula() -> None:
    for config in (TINY, RICH, dataclasses.replace(RICH, bias=False)):
        leaves = jax.tree.leaves(nnx.to_pure_dict(abstract(config)[1]))
        # What a model has beside attention does not depend on the latents.
        plain = dataclasses.replace(config, latent=LatentConfig(), d_head=4)
        other = 4 * 12 * 12 + (4 * 12 if config.bias else 0)
        assert sum(leaf.size for leaf in leaves) - other == count_params(config) - count_params(
            plain
        )


def test_no_tokens() -> None:
    params = jax.device_put(make_params(TINY))
    out, _ = apply(TINY, params, *jax.device_put((inputs(2, 0), at(2, 0, 0))))
    assert out.shape == (2, 0, 12)
