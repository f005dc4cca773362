"""muP and CompleteP: the scale of activations depends neither on the width nor on the depth.

The coordinate check of Yang et al. 2022 (appendix D.1), over the depth as in Dey et al. 2025
(figure 7): root mean squares at initialization and after 10 steps of AdamW.
"""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_nn import GPTConfig, bind, eps_scales, init, learning_rate_scales, weight_decay_scales
from tjx_nn.binding import Params

STEPS, RATE, EPS, DECAY = 10, 2e-3, 1e-8, 0.1
WIDTH, HEADS, DEPTH = 16, 2, 2
BASE = GPTConfig(
    vocab_size=64, max_seq_len=16, n_layer=DEPTH, n_head=HEADS, d_model=WIDTH, init_std=0.03,
    mup_base=WIDTH, mup_base_depth=DEPTH, tied_head=False, scan_layers=True,
    attention_implementation="reference",  # compiles fastest
)  # fmt: skip
STANDARD = dataclasses.replace(BASE, mup_base=None, mup_base_depth=None)


def sized(config: GPTConfig, width: int, depth: int) -> GPTConfig:
    """Return a model that is wider and deeper by these factors, with heads of the same size."""
    return dataclasses.replace(
        config, d_model=width * WIDTH, n_head=width * HEADS, n_layer=depth * DEPTH
    )


@cache
def coordinates(config: GPTConfig) -> dict[str, float]:
    """Train with AdamW; return the root mean squares of activations and of their changes."""
    tokens = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)
    scales = [f(config) for f in (learning_rate_scales, weight_decay_scales, eps_scales)]

    def measure(params: Params) -> tuple[jax.Array, jax.Array]:
        model = bind(config, params)
        stream, _ = model.run_blocks(model.embed_tokens(tokens), tokens)
        return stream, model(tokens)

    def loss(params: Params) -> jax.Array:
        return bind(config, params).losses(tokens, tokens[:, ::-1]).tokens.mean()

    def adamw(p: Any, m: Any, v: Any, t: Any, rate: float, decay: float, eps: float) -> Any:
        step = m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.95**t)) + eps * EPS)
        return p - RATE * rate * (step + decay * DECAY * p)

    @jax.jit
    def run(key: jax.Array) -> dict[str, jax.Array]:
        def body(carry: Any, t: jax.Array) -> Any:
            params, m, v = carry
            g = jax.grad(loss)(params)
            m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
            v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, g)
            params = jax.tree.map(lambda p, m, v, *s: adamw(p, m, v, t, *s), params, m, v, *scales)
            return (params, m, v), None

        first = init(config, key)
        zeros = jax.tree.map(jnp.zeros_like, first)
        (last, *_), _ = jax.lax.scan(body, (first, zeros, zeros), jnp.arange(1.0, STEPS + 1))
        (stream, logits), (trained_stream, trained_logits) = measure(first), measure(last)
        found = {
            "stream at init": stream,
            "stream after training": trained_stream,
            "change of the stream": trained_stream - stream,
            "change of the logits": trained_logits - logits,
        }
        return {name: jnp.sqrt(jnp.square(x).mean()) for name, x in found.items()}

    with jax.transfer_guard("allow"):
        found = jax.device_get(run(jax.random.key(0)))
    return {name: float(value) for name, value in found.items()}


def growth(config: GPTConfig, width: int, depth: int) -> dict[str, float]:
    """Return the ratios to the model of base size."""
    base = coordinates(config)
    return {
        name: value / base[name] for name, value in coordinates(sized(config, width, depth)).items()
    }


@pytest.mark.parametrize(
    ("width", "depth"),
    [
        (4, 1),
        (1, 16),
        pytest.param(16, 1, marks=pytest.mark.slow),
        pytest.param(1, 4, marks=pytest.mark.slow),
    ],
)
def test_coordinate_check(width: int, depth: int) -> None:
    ratios = growth(BASE, width, depth)
    logits = ratios.pop("change of the logits")
    assert all(1 / 1.2 < ratio < 1.2 for ratio in ratios.values()), ratios
    assert 0.5 < logits < 2  # random initial rows of the head have a share that tends to 0


@pytest.mark.parametrize(("width", "depth", "least"), [(4, 1, 2), (1, 16, 4)])
def test_standard_parametrization_fails_the_check(width: int, depth: int, least: float) -> None:
    assert growth(STANDARD, width, depth)["change of the stream"] > least


def test_scales_of_a_block_and_of_the_embedding() -> None:
    config = sized(BASE, width=4, depth=8)
    up, table = ("blocks", "mlp", "up"), ("wte", "embedding")

    def at(tree: Any, *path: str) -> Any:
        for name in path:
            tree = tree[name]
        return tree

    rate, decay, eps = (f(config) for f in (learning_rate_scales, weight_decay_scales, eps_scales))
    assert [at(tree, *up, "kernel") for tree in (rate, decay, eps)] == [1 / 4, 4, 1 / 32]
    assert [at(tree, *up, "bias") for tree in (rate, decay, eps)] == [1, 1, 1 / 32]
    assert [at(tree, *table) for tree in (rate, decay, eps)] == [1, 1, 1 / 4]


def test_layer_decay_of_a_table_is_that_of_the_embeddings() -> None:
    config = dataclasses.replace(STANDARD, value_mix="embedding")
    scales = learning_rate_scales(config, layer_decay=0.5)
    first = scales["blocks"]["mlp"]["up"]["kernel"].ravel()[0]
    for table in ("wte", "value_embeddings"):
        assert scales[table]["embedding"] == first / 2


@pytest.mark.parametrize("scales", [learning_rate_scales, weight_decay_scales, eps_scales])
def test_without_a_base_nothing_is_scaled(scales: Any) -> None:
    assert set(jax.tree.leaves(scales(STANDARD))) == {1.0}
