"""Int8 weights: products against NumPy float64, models against their dequantized parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_nn import (
    GPTConfig,
    Int8Kernel,
    LoRAConfig,
    bind,
    dequantize,
    generate,
    init,
    lora,
    quantize,
)
from tjx_nn.binding import Params
from tjx_nn.layout import SINGLE_DEVICE, ParamSharding
from tjx_nn.quantization.int8 import int8_matmul, quantize_kernel

SHARDING = ParamSharding(SINGLE_DEVICE, (None, None))
LORA = LoRAConfig(rank=2, dora=True)
dense: Callable[[Any], Any] = jax.jit(dequantize)


@pytest.fixture(scope="module")
def int8(tiny: GPTConfig, params: Params) -> Params:
    quantized: Params = jax.jit(quantize, static_argnums=0)(tiny, params)
    return quantized


def test_kernels_are_rounded_to_the_nearest_multiple_of_their_scale() -> None:
    w = np.random.default_rng(0).normal(size=(2, 24, 5)).astype(np.float32)
    w[1, :, 3] = 0
    kernel = jax.device_get(jax.jit(quantize_kernel)(jax.device_put(w)))
    scale = np.abs(w).max(1) / 127
    error = np.abs(kernel.values.astype(np.float64) * kernel.scale[:, None] - w)
    assert (error <= scale[:, None] * 0.5 * (1 + 1e-4)).all()
    assert np.abs(kernel.values).max(1).tolist() == [[127] * 5, [127] * 3 + [0, 127]]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-5), ("bfloat16", 4e-3)])
def test_products_and_gradients_are_those_of_the_dequantized_kernel(
    dtype: str, bound: float
) -> None:
    """The bound of float32 is that of inputs of 15 bits, of bfloat16 its rounding."""
    draw = np.random.default_rng(1)
    x64 = draw.normal(size=(3, 5, 48))
    x64[0, 0], x64[1, 1, 7] = 0, 40
    x64 = np.asarray(x64.astype(dtype), np.float64)
    dy64 = np.asarray(draw.normal(size=(3, 5, 16)).astype(dtype), np.float64)
    values = draw.integers(-127, 128, (48, 16), np.int8)
    scale = draw.uniform(0.5, 2, 16).astype(np.float32)

    @jax.jit
    def product(x: jax.Array, dy: jax.Array, w: Int8Kernel) -> Any:
        y, pull = jax.vjp(lambda x: int8_matmul(SHARDING, x, w), x)
        return y, pull(dy)[0]

    given = (x64.astype(dtype), dy64.astype(dtype), Int8Kernel(values, scale))
    y, dx = product(*jax.device_put(given))
    w64 = values * scale.astype(np.float64)
    for found, expected, bounds in (
        (y, x64 @ w64, np.abs(x64).max(-1, keepdims=True) * np.abs(w64).sum(0)),
        (dx, dy64 @ w64.T, np.abs(dy64) @ np.abs(w64.T)),
    ):
        assert found.dtype == dtype
        assert (np.abs(np.asarray(found, np.float64) - expected) <= bound * bounds).all()


def test_a_quantized_model_computes_as_its_dequantized_parameters(
    tiny: GPTConfig, params: Params, int8: Params, tokens: jax.Array
) -> None:
    paths = [path for path, leaf in jax.tree.leaves_with_path(int8) if leaf.dtype == jnp.int8]
    assert len(paths) == 6  # query, key, value, out, up, down
    logits = jax.jit(lambda params: bind(tiny, params)(tokens))
    close, expected, before = jax.device_get([logits(int8), logits(dense(int8)), logits(params)])
    assert np.abs(close - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(expected - before).max() > 1e-3 * np.abs(before).max()
    prompts = jax.device_put(np.arange(10, dtype=np.int32).reshape(2, 5))
    lengths = jax.device_put(np.array([5, 3], np.int32))
    new = [
        jax.device_get(generate(tiny, each, prompts, lengths, max_new_tokens=8))
        for each in (int8, dense(int8))
    ]
    assert (new[0] == new[1]).all()
    narrow = dataclasses.replace(tiny, dtype="bfloat16")
    assert generate(narrow, int8, prompts, lengths, max_new_tokens=8).shape == (2, 8)


def test_adapters_train_on_an_int8_base(tiny: GPTConfig, int8: Params, tokens: jax.Array) -> None:
    @jax.jit
    def made(base: Params) -> Any:
        adapters = lora.init(tiny, LORA, jax.random.key(1), base)
        return jax.tree.map(lambda x: x + 0.01, adapters)

    @jax.jit
    def gradients(base: Params, adapters: Any) -> Any:
        def loss(adapters: Any) -> jax.Array:
            return jnp.square(lora.bind(tiny, LORA, base, adapters)(tokens)).mean()

        return jax.grad(loss)(adapters)

    adapters, float_base = made(int8), dense(int8)
    found, expected = jax.device_get([gradients(base, adapters) for base in (int8, float_base)])
    for close, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(exact).max() > 0
        assert np.abs(close - exact).max() <= 1e-3 * np.abs(exact).max()
    merge = jax.jit(lora.merge, static_argnums=2)
    merged = jax.device_get([merge(base, adapters, LORA) for base in (int8, float_base)])
    jax.tree.map(np.testing.assert_array_equal, *merged)


def test_parameters_of_another_model_are_refused(tiny: GPTConfig, int8: Params) -> None:
    wider = dataclasses.replace(tiny, d_ff=48)
    shapes = jax.eval_shape(lambda: init(tiny, jax.random.key(0)))
    message = r"params blocks\.mlp\.up\.kernel: got shape \[2, 24, 96\]; expected \[2, 24, 48\]"
    with pytest.raises(ValueError, match=message):
        quantize(wider, shapes)
    with pytest.raises(ValueError, match=message):
        bind(wider, int8)
