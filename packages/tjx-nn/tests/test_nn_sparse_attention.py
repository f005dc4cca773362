"""Sparse attention against dense attention and a NumPy reference that sorts scores."""

import dataclasses
import functools
from typing import Any

import attention_layers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_layers import T, abstract, at, decode
from flax import nnx

from tjx_nn import GPTConfig, LatentConfig, RopeConfig, SparseConfig
from tjx_nn.attention import sparse as sparse_attention
from tjx_nn.attention.kv_cache import KVCache
from tjx_nn.binding import Params
from tjx_nn.inputs import TokenMetadata
from tjx_nn.layers.scan_layers import AuxLosses

make_params = functools.partial(attention_layers.make_params, scale=0.3)
inputs = functools.partial(attention_layers.inputs, features=16)
PICKY = SparseConfig(top_k=3, n_head=2, head_dim=4)
TINY = GPTConfig(
    n_layer=1, n_head=4, n_kv_head=2, d_model=16, max_seq_len=16, positions="rope",
    rope=RopeConfig(base=50.0), sparse=PICKY,
)  # fmt: skip
LATENT = dataclasses.replace(
    TINY, n_kv_head=None, latent=LatentConfig(kv_dim=5, rope_dim=2, v_dim=3)
)
RICH = dataclasses.replace(TINY, positions="alibi", attention_soft_cap=2.0, qk_norm=True)
# The attention scores of each head select its keys.
BY_SCORE = dataclasses.replace(RICH, sparse=SparseConfig(top_k=3, indexer=False))
SINKS = dataclasses.replace(
    TINY, attention_sinks=True, attention_gate=3, sparse=SparseConfig(top_k=T, indexer=False)
)


def with_top_k(config: GPTConfig, top_k: int | None) -> GPTConfig:
    return dataclasses.replace(config, sparse=dataclasses.replace(config.sparse, top_k=top_k))


@functools.partial(jax.jit, static_argnames=("config", "window", "chunk"))
def apply(
    config: GPTConfig,
    params: Params,
    x: jax.Array,
    metadata: TokenMetadata,
    window: int | None = None,
    chunk: int = 128,
) -> tuple[jax.Array, KVCache, AuxLosses]:
    layer = nnx.merge(abstract(config)[0], params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_attention, "CHUNK", chunk)
        result: tuple[jax.Array, KVCache, AuxLosses] = layer(x, *metadata, window=window)
    return result


def documents() -> TokenMetadata:
    """Two rows of two documents each, of different lengths."""
    ids = np.array([[0] * 6 + [2] * 4, [5] * 3 + [4] * 7], np.int32)
    starts = np.array([[*range(6), *range(4)], [*range(3), *range(7)]], np.int32)
    return TokenMetadata(*jax.device_put((starts, ids)))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    y: np.ndarray = weights / weights.sum()
    return y


def norm(x: np.ndarray, p: Any) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    y: np.ndarray = (
        x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]
    )
    return y


def oracle(
    config: GPTConfig,
    params: Params,
    x_BTD: np.ndarray,
    ids: np.ndarray,
    window: int | None,
) -> tuple[np.ndarray, float]:
    """Loop over queries and heads in float64, with ALiBi, soft cap and QK-norm, without RoPE."""
    p = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    n, k, h = config.n_head, config.kv_heads, config.head_dim
    sparse, i = config.sparse, p.get("indexer")
    outs, losses = np.zeros(x_BTD.shape), []
    for b, x in enumerate(x_BTD.astype(np.float64)):
        q, keys, values = (
            (x @ p[name]["kernel"] + p[name]["bias"]).reshape(len(x), -1, h)
            for name in ("query", "key", "value")
        )
        q, keys = norm(q, p["query_norm"]), norm(keys, p["key_norm"])
        if i is not None:
            index_q = (x @ i["query"]["kernel"]).reshape(len(x), sparse.n_head, -1)
            index_k = norm(x @ i["key"]["kernel"], i["key_norm"])
            index_w = x @ i["weight"]["kernel"]
        for t in range(len(x)):
            seen = [s for s in range(t + 1) if ids[b, s] == ids[b, t] and t - s < (window or T)]
            scores = np.empty((n, T))
            for head in range(n):
                s = keys[:, head // (n // k)] @ q[t, head] / np.sqrt(h)
                cap = config.attention_soft_cap
                s = s if cap is None else cap * np.tanh(s / cap)
                scores[head] = s - 2.0 ** (-8 / n * (head + 1)) * (t - np.arange(T))
            rank = scores
            if i is not None:
                rank = np.tile(index_w[t] @ np.maximum(index_q[t] @ index_k.T, 0), (n, 1))
            # A stable sort: ties prefer the first key.
            picked = [sorted(seen, key=lambda s: -by[s])[: sparse.top_k] for by in rank]
            weights = [softmax(scores[head, keep]) for head, keep in enumerate(picked)]
            heads = [w @ values[picked[j], j // (n // k)] for j, w in enumerate(weights)]
            outs[b, t] = np.concatenate(heads) @ p["out"]["kernel"] + p["out"]["bias"]
            if i is not None:
                total, guess = np.mean(weights, 0), softmax(rank[0, picked[0]])
                losses.append((total * np.log(total / guess)).sum())
    return outs, float(np.mean(losses)) if losses else 0.0


@pytest.mark.parametrize("config", [RICH, BY_SCORE], ids=["indexer", "scores"])
@pytest.mark.parametrize("window", [None, 4])
def test_top_k_attention_equals_the_numpy_reference(config: GPTConfig, window: int | None) -> None:
    params, x, metadata = make_params(config), inputs(), documents()
    placed = jax.device_put((params, x, metadata))
    out, _, aux_losses = jax.device_get(apply(config, *placed, window=window))
    expected, loss = oracle(config, params, x, np.asarray(metadata.segment_ids), window)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert list(aux_losses) == (["indexer_loss"] if config is RICH else [])
    np.testing.assert_allclose(aux_losses.get("indexer_loss", 0), loss, rtol=1e-4)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def gradients(
    config: GPTConfig,
    params: Params,
    x: jax.Array,
    metadata: TokenMetadata,
    window: int | None,
    chunk: int,
) -> Any:
    """Output and loss, and their gradients with respect to parameters and input."""

    def both(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, _, aux_losses = apply(config, params, x, metadata, window=window, chunk=chunk)
        return out, aux_losses.get("indexer_loss", jnp.zeros((), jnp.float32))

    (out, loss), pullback = jax.vjp(both, params, x)
    of_out, of_loss = pullback((out, 0 * loss)), pullback((0 * out, jnp.ones_like(loss)))
    return out, loss, of_out, of_loss


def run_gradients(config: GPTConfig, params: Params, chunk: int, window: int | None = 6) -> Any:
    placed = jax.device_put((params, inputs(), documents()))
    return jax.device_get(gradients(config, *placed, window, chunk))


def assert_close(found: Any, expected: Any, atol: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, expected)


@pytest.mark.parametrize("config", [RICH, LATENT], ids=["alibi", "latent"])
def test_with_all_keys_it_equals_dense_attention(config: GPTConfig) -> None:
    params = make_params(with_top_k(config, T))
    out, loss, of_out, _ = run_gradients(with_top_k(config, T), params, chunk=4)
    assert loss > 0.01
    indexer = of_out[0].pop("indexer")
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(indexer))
    params = {name: leaf for name, leaf in params.items() if name != "indexer"}
    dense, _, of_dense, _ = run_gradients(with_top_k(config, None), params, chunk=4)
    np.testing.assert_allclose(out, dense, atol=1e-6)
    assert_close(of_out, of_dense, 2e-5)


@pytest.mark.parametrize(
    "config",
    [SINKS, dataclasses.replace(LATENT, sparse=SINKS.sparse)],
    ids=["sinks and gates", "latent"],
)
def test_without_an_indexer_all_keys_equal_dense_attention(config: GPTConfig) -> None:
    params = make_params(config)
    found = run_gradients(config, params, chunk=4)
    dense = run_gradients(with_top_k(config, None), params, chunk=4)
    np.testing.assert_allclose(found[0], dense[0], atol=1e-6)
    assert_close(found[2], dense[2], 2e-5)


def test_chunked_queries_equal_one_chunk() -> None:
    # Chunks of 4, 4 and 2 rows, the last one padded.
    params = make_params(RICH)
    assert_close(run_gradients(RICH, params, 4), run_gradients(RICH, params, 128), 2e-5)


# Configurations that other tests compile: top-k MHA and latent attention with all keys.
@pytest.mark.parametrize("config", [RICH, with_top_k(LATENT, T)], ids=["alibi", "latent"])
def test_only_the_indexer_loss_trains_the_indexer(
    config: GPTConfig,
) -> None:
    def largest(tree: Any) -> list[float]:
        return [float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree)]

    _, _, (of_params, of_x), (by_loss, x_by_loss) = run_gradients(config, make_params(config), 4)
    assert max(largest(of_params.pop("indexer"))) == 0
    assert min(largest(of_x)) > 1e-3
    assert min(largest(by_loss.pop("indexer"))) > 1e-6
    assert max(largest((by_loss, x_by_loss))) == 0


def test_training_the_indexer_lowers_its_loss() -> None:
    params, x, metadata = jax.device_put((make_params(TINY), inputs(), at()))

    @jax.jit
    def step(indexer: Params) -> Any:
        def loss(indexer: Params) -> jax.Array:
            aux_losses = apply(TINY, params | {"indexer": indexer}, x, metadata)[2]
            value: jax.Array = aux_losses["indexer_loss"]
            return value

        value, gradient = jax.value_and_grad(loss)(indexer)
        return value, jax.tree.map(lambda p, g: p - 0.05 * g, indexer, gradient)

    indexer, values = params["indexer"], []
    for _ in range(30):
        value, indexer = step(indexer)
        values.append(float(jax.device_get(value)))
    assert min(values) >= 0
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (RICH, 6), (LATENT, None), (BY_SCORE, 6), (with_top_k(SINKS, 3), None),
        (dataclasses.replace(LATENT, sparse=BY_SCORE.sparse), None),
    ],
    ids=["alibi", "latent", "scores", "scores, sinks", "scores, latent"],
)  # fmt: skip
def test_decoding_one_token_and_several_equals_the_full_pass(
    config: GPTConfig, window: int | None
) -> None:
    params, x = jax.device_put((make_params(config), inputs()))
    metadata = at()
    expected, entries, _ = apply(config, params, x, metadata, window=window)
    # Unused slots contain garbage with high indexer scores. The first tokens have fewer visible
    # keys than top_k.
    cache = {
        name: jax.device_put(np.full((2, 12, *entry.shape[2:]), 9, np.float32))
        for name, entry in entries.items()
    }
    expected, x = jax.device_get((expected, x))
    for start, stop in [(0, 3), (3, 6), (6, 7), (7, 8), (8, 9), (9, 10)]:
        new = jax.device_put((x[:, start:stop], cache, at(2, start, stop)))
        out, cache = decode(config, params, *new, window=window)
        np.testing.assert_allclose(jax.device_get(out), expected[:, start:stop], atol=1e-5)


def test_no_tokens_and_large_inputs() -> None:
    params = jax.device_put(make_params(TINY))
    out, _, aux_losses = apply(TINY, params, *jax.device_put((inputs(2, 0), at(2, 0, 0))))
    assert out.shape == (2, 0, 16)
    assert jax.device_get(aux_losses["indexer_loss"]) == 0
    large = jax.device_put((100 * inputs(), at()))
    out, _, aux_losses = jax.device_get(apply(TINY, params, *large))
    assert np.isfinite(out).all()
    assert np.isfinite(aux_losses["indexer_loss"])
