"""Extreme inputs: attention layers and norms and their derivatives stay finite."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tjx_nn import GPTConfig, LatentConfig, SparseConfig
from tjx_nn.binding import Params
from tjx_nn.layers.block import make_attention
from tjx_nn.layers.norms import make_norm

T = 10
PLAIN = GPTConfig(n_layer=1, n_head=4, d_model=16, max_seq_len=16, positions="rope")
SPARSE = SparseConfig(top_k=3, n_head=2, head_dim=4)
LATENT = LatentConfig(kv_dim=5, q_dim=6, rope_dim=2)
KINDS: dict[str, GPTConfig] = {
    "plain": PLAIN,
    "alibi, qk-norm, cap": dataclasses.replace(
        PLAIN, n_kv_head=2, positions="alibi", qk_norm=True, attention_soft_cap=30.0
    ),
    "latent": dataclasses.replace(PLAIN, latent=LATENT),
    "sparse": dataclasses.replace(PLAIN, n_kv_head=2, sparse=SPARSE),
    "latent and sparse": dataclasses.replace(PLAIN, latent=LATENT, sparse=SPARSE),
}
# Projections of queries and keys, also of the indexer.
LOUD = {"query", "query_up", "key", "key_up", "kv_down"}


@functools.cache
def abstract(config: GPTConfig, causal: bool = True) -> tuple[Any, Any]:
    with jax.transfer_guard("allow"):
        return nnx.split(
            nnx.eval_shape(lambda: make_attention(config, causal=causal, rngs=nnx.Rngs(0)))
        )


def make_params(config: GPTConfig) -> Params:
    rng = np.random.default_rng(0)
    shapes: Params = nnx.to_pure_dict(abstract(config)[1])

    def values(path: tuple[Any, ...], p: Any) -> np.ndarray:
        loud = 100 if {step.key for step in path} & LOUD else 1
        return np.asarray(loud * rng.standard_normal(p.shape), np.float32)

    params: Params = jax.tree.map_with_path(values, shapes)
    return params


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_queries_and_keys_times_100(kind: str, causal: bool) -> None:
    config = KINDS[kind]

    @jax.jit
    def compute(params: Params, x: jax.Array, dy: jax.Array) -> Any:
        def call(params: Params, x: jax.Array) -> Any:
            layer = nnx.merge(abstract(config, causal)[0], params)
            out, entries, aux_losses = layer(x)
            return (out, aux_losses), entries

        (out, aux_losses), pullback, entries = jax.vjp(call, params, x, has_aux=True)
        gradients = pullback((dy, jax.tree.map(jnp.ones_like, aux_losses)))
        if not causal:
            return out, aux_losses, gradients
        # The last token again, decoded with a cache.
        layer = nnx.merge(abstract(config)[0], params)
        last, _ = layer.decode(x[:, -1:], entries, jnp.full((2, 1), T - 1))
        return out, aux_losses, gradients, last

    x, dy = np.random.default_rng(1).standard_normal((2, 2, T, 16)).astype(np.float32)
    found = jax.device_get(compute(*jax.device_put((make_params(config), x, dy))))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert np.abs(found[2][1]).max() > 0
    if causal:
        scale = np.abs(found[0]).max()
        np.testing.assert_allclose(found[3][:, 0], found[0][:, -1], atol=1e-3 * scale)


@pytest.mark.parametrize("kind", ["plain", "latent", "sparse"])
def test_attention_dropout_is_unbiased(kind: str) -> None:
    config = dataclasses.replace(KINDS[kind], attention_dropout=0.5)
    shapes: Params = nnx.to_pure_dict(abstract(config)[1])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: 0.3 * rng.standard_normal(p.shape).astype(np.float32), shapes)

    @jax.jit
    def compute(params: Params, x: jax.Array, seed: jax.Array) -> Any:
        layer = nnx.merge(abstract(config)[0], params)
        keys = jax.random.split(jax.random.key(seed), 1000)
        each = jax.lax.map(lambda key: layer(x, dropout_key=key)[0], keys)
        return layer(x)[0], each

    x = rng.standard_normal((2, T, 16)).astype(np.float32)
    plain, each = jax.device_get(compute(*jax.device_put((params, x, np.uint32(0)))))
    error = each.std(0) / np.sqrt(len(each))
    assert (error > 0).all()
    assert np.all(np.abs(each.mean(0) - plain) < 5 * error)


def test_a_query_without_keys_has_zero_output_and_gradient() -> None:
    config = dataclasses.replace(PLAIN, positions="none")
    ids = np.repeat(np.array([[3], [5]], np.int32), T, 1)

    @jax.jit
    def compute(params: Params, x: jax.Array, encoded: jax.Array, ids: jax.Array) -> Any:
        def call(params: Params, x: jax.Array, encoded: jax.Array) -> jax.Array:
            layer = nnx.merge(abstract(config, False)[0], params)
            entries = layer.keys_values(encoded, None)
            out: jax.Array = layer.attend(x, entries, None, ids, ids * 0 + 3)
            return out

        out, pullback = jax.vjp(call, params, x, encoded)
        return out, *pullback(jnp.ones_like(out))

    x, encoded = np.random.default_rng(1).standard_normal((2, 2, T, 16)).astype(np.float32)
    params = make_params(config)
    out, of_params, *of_inputs = jax.device_get(compute(*jax.device_put((params, x, encoded, ids))))
    np.testing.assert_array_equal(out[1], np.tile(params["out"]["bias"], (T, 1)))
    assert np.abs(out[0] - out[1]).max() > 0.1
    for gradient in of_inputs:
        assert not gradient[1].any()
        assert gradient[0].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_params))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_of_nearly_constant_inputs(kind: Any, dtype: str) -> None:
    noise = np.random.default_rng(0).standard_normal(16)
    rows = [0 * noise, 0 * noise + 3, 3 + 1e-6 * noise, -1e4 + 1e-3 * noise, 1e-20 * noise]
    x = np.stack(rows).astype(np.dtype(dtype))
    norm = abstract_norm(GPTConfig(norm=kind))

    @jax.jit
    def compute(x: jax.Array, scale: jax.Array) -> Any:
        def call(x: jax.Array, scale: jax.Array) -> jax.Array:
            values = {"scale": scale} | ({"bias": 0 * scale} if kind == "layernorm" else {})
            y: jax.Array = nnx.merge(norm, values)(x)
            return y

        y, pullback = jax.vjp(call, x, scale)
        return y, pullback(y + 1)

    y, gradients = jax.device_get(compute(*jax.device_put((x, np.ones(16, np.float32)))))
    assert all(np.isfinite(leaf.astype(np.float32)).all() for leaf in (y, *gradients))
    y = y.astype(np.float32)
    assert np.abs(y).max() < 4  # noise is not amplified beyond normalized features
    assert not y[0].any()
    np.testing.assert_allclose(y[1], 0 if kind == "layernorm" else 1, atol=1e-6)


def abstract_norm(config: GPTConfig) -> Any:
    with jax.transfer_guard("allow"):
        return nnx.split(nnx.eval_shape(lambda: make_norm(config, 16)))[0]
