"""`attention_weights` returns the weights of the model's own forward pass."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tjx_nn import GPTConfig, LatentConfig, SparseConfig, attention_weights
from tjx_nn.binding import Params

MODELS: dict[str, dict[str, Any]] = {
    "learned positions, two key heads": {},
    "windows, ALiBi, a cap": {
        "positions": "alibi", "window": 3, "global_every": 2, "attention_soft_cap": 5.0,
    },
    "rotary, normalised": {"positions": "rope", "qk_norm": True},
    "chunks": {"positions": "rope", "window": 4, "chunked_window": True},
    "sinks": {"attention_sinks": True},
    "latent": {
        "positions": "rope", "n_kv_head": None, "latent": LatentConfig(kv_dim=8, rope_dim=4),
    },
}  # fmt: skip


def some_tokens(config: GPTConfig) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab_size, (2, 9)).astype(np.int32)


@pytest.mark.parametrize("name", MODELS)
def test_weights_sum_to_one_over_visible_keys_and_sinks_and_give_the_logits(
    name: str,
    tiny: GPTConfig,
    make: Callable[..., Params],
    run: Callable[..., np.ndarray],
) -> None:
    config = dataclasses.replace(tiny, **MODELS[name])
    params, tokens = make(config), some_tokens(config)
    weights, logits = jax.device_get(attention_weights(config, params, jax.device_put(tokens)))
    assert weights.shape == (config.n_layer, 2, config.n_head, 9, 9)
    if config.attention_sinks:
        assert (weights.sum(-1) < 0.99).all()
    else:
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    distance = np.arange(9)[:, None] - np.arange(9)
    for layer, window in enumerate(config.windows):
        unseen = (distance < 0) | (distance >= (window or 9))
        if config.chunked_window:
            unseen |= np.arange(9)[:, None] // 4 != np.arange(9) // 4
        assert (weights[layer][..., unseen] == 0).all()
        assert (weights[layer][..., ~unseen] > 0).all()
    np.testing.assert_allclose(logits, run(config, params, tokens), atol=1e-5)


def test_weights_of_the_first_layer_equal_numpy(tiny: GPTConfig, params: Params) -> None:
    tokens = some_tokens(tiny)
    weights, _ = jax.device_get(attention_weights(tiny, params, jax.device_put(tokens)))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(params))
    x = p["wte"]["embedding"][tokens] + p["wpe"]["embedding"][:9]
    block = jax.tree.map(lambda x: x[0], p["blocks"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + tiny.norm_eps)
    x = x * block["ln_1"]["scale"] + block["ln_1"]["bias"]
    q, k = (
        (x @ block["attention"][name]["kernel"] + block["attention"][name]["bias"]).reshape(
            2, 9, heads, tiny.head_dim
        )
        for name, heads in (("query", 4), ("key", 2))
    )
    scores = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, 2, axis=2)) / np.sqrt(tiny.head_dim)
    scores[..., np.triu_indices(9, 1)[0], np.triu_indices(9, 1)[1]] = -np.inf
    expected = np.exp(scores - scores.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights[0], expected, atol=1e-6)


def test_sparse_attention_raises(tiny: GPTConfig, params: Params) -> None:
    sparse = dataclasses.replace(tiny, sparse=SparseConfig(top_k=4))
    with pytest.raises(ValueError, match=r"sparse\.top_k: got 4"):
        attention_weights(sparse, params, some_tokens(tiny))
