"""Scan, unrolling and rematerialization: equal results, less memory, 100 layers."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_kernels.target import Platform, Target
from tjx_nn import ExpertsConfig, GPTConfig, bind, init
from tjx_nn.binding import Params
from tjx_nn.layers import scan_layers

Make = Callable[..., Params]

# A dense block, one group of a pattern of windows, and a remaining block.
PATTERN = GPTConfig(
    vocab_size=23, max_seq_len=16, n_layer=4, n_head=2, d_model=16, window=4, global_every=2,
    experts=ExpertsConfig(count=2, per_token=1, d_ff=8, first_layer=1, capacity_factor=None),
)  # fmt: skip
DEEP = GPTConfig(
    vocab_size=11, max_seq_len=32, n_layer=100, n_head=2, d_model=8, remat="full", remat_every=2
)


@functools.partial(jax.jit, static_argnames="config")
def loss_and_gradients(config: GPTConfig, params: Params, tokens: jax.Array) -> Any:
    def loss(params: Params) -> jax.Array:
        found = bind(config, params).losses(tokens, tokens[:, ::-1])
        return found.tokens.mean() + found.penalty

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(
    "change",
    [
        {"scan_layers": True},
        {"scan_layers": True, "remat": "full", "remat_every": 3},
        {"scan_layers": True, "remat": "dots"},
        {"scan_layers": True, "remat": "attention"},
    ],
    ids=["loop", "full", "dots", "attention"],
)
def test_depth_options_change_neither_loss_nor_gradients(
    make: Make, tokens: jax.Array, change: dict[str, Any]
) -> None:
    params = make(PATTERN)
    unrolled = dataclasses.replace(PATTERN, scan_layers=False)
    expected = loss_and_gradients(unrolled, params, tokens)
    found = loss_and_gradients(dataclasses.replace(PATTERN, **change), params, tokens)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6),
        *jax.device_get((expected, found)),
    )


@pytest.mark.parametrize(
    ("platform", "count", "loop"), [("cpu", 2, True), ("gpu", 24, False), ("gpu", 25, True)]
)
def test_the_default_unrolls_on_gpus_up_to_a_depth(
    monkeypatch: pytest.MonkeyPatch, platform: Platform, count: int, loop: bool
) -> None:
    monkeypatch.setattr(scan_layers, "current_target", lambda: Target(platform, ""))
    assert scan_layers.uses_scan(PATTERN, count) == loop
    for given in (True, False):
        config = dataclasses.replace(PATTERN, scan_layers=given)
        assert scan_layers.uses_scan(config, count) == given


@pytest.mark.parametrize(
    ("count", "width", "remat", "loop"),
    [
        (12, 128, "none", False),
        (13, 128, "none", True),
        (4, 64, "none", True),
        (4, 128, "full", True),
    ],
)
def test_the_default_unrolls_few_wide_blocks_on_cpus(
    count: int, width: int, remat: Any, loop: bool
) -> None:
    config = GPTConfig(n_layer=count, d_model=width, n_head=2, remat=remat)
    assert scan_layers.uses_scan(config, count) == loop


def test_the_gpu_code_path_computes_the_same(
    make: Make, tokens: jax.Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unrolled blocks with dropout, recomputed GELU, and materialized logits."""
    config = dataclasses.replace(PATTERN, dropout=0.2)

    def compute() -> Any:
        def loss(params: Params, key: jax.Array) -> jax.Array:
            network = bind(config, params)
            return network.losses(tokens, tokens[:, ::-1], dropout_key=key).tokens.mean()

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(make(config), jax.random.key(1)))

    with jax.transfer_guard("allow"):
        expected = compute()
        for name in (
            "tjx_nn.layers.scan_layers",
            "tjx_nn.layers.mlp",
            "tjx_kernels.cross_entropy.api",
        ):
            module = importlib.import_module(name)
            monkeypatch.setattr(module, "current_target", lambda: Target("gpu", ""))
        found = compute()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), expected, found)


def test_a_hundred_layers_train_under_remat(descend: Callable[..., list[float]]) -> None:
    tokens = np.random.default_rng(0).integers(0, 11, (2, 32), np.int32)
    with jax.transfer_guard("allow"):
        params = jax.jit(init, static_argnums=0)(DEEP, jax.random.key(0))
    losses = descend(lambda p: bind(DEEP, p).losses(tokens, tokens[:, ::-1]).tokens.mean(), params)
    assert np.isfinite(losses).all()
    assert losses[0] > losses[10] > losses[-1]


def test_remat_reduces_the_memory_of_residuals() -> None:
    def memory(**options: Any) -> int:
        config = dataclasses.replace(DEEP, **options)
        with jax.transfer_guard("allow"):
            params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
        tokens = jax.eval_shape(lambda: jnp.zeros((8, 32), np.int32))
        found = loss_and_gradients.lower(config, params, tokens).compile().memory_analysis()
        assert found is not None
        temporary: int = found.temp_size_in_bytes
        return temporary

    assert memory(remat_every=1) < 0.35 * memory(remat="none")
