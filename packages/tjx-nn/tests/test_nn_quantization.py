"""Int8 and int4 weights: products against NumPy float64, models against dequantized parameters.

`unpacked` states the layout of int4 values independently of the package.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_nn import (
    GPTConfig,
    Int4Kernel,
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
from tjx_nn.quantization.int4 import quantize_int4
from tjx_nn.quantization.int8 import quantize_int8
from tjx_nn.quantization.kernels import QuantizedKernel, quantized_matmul

SHARDING = ParamSharding(SINGLE_DEVICE, (None, None))
LORA = LoRAConfig(rank=2, dora=True)
dense: Callable[[Any], Any] = jax.jit(dequantize)


@pytest.fixture(scope="module", params=["int8", "int4"])
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def quantized(dtype: Any, tiny: GPTConfig, params: Params) -> Params:
    found: Params = jax.jit(quantize, static_argnums=(0, 2))(tiny, params, dtype)
    return found


def unpacked(kernel: Int4Kernel) -> np.ndarray:
    """Return the weights of a kernel [I, O] in float64."""
    groups = kernel.scale.shape[0]
    size = 2 * kernel.values.shape[0] // groups
    weights = np.empty((groups, size, kernel.values.shape[1]))
    for group, packed in enumerate(np.split(kernel.values, groups)):
        values = np.concatenate([packed % 16, packed // 16]).astype(np.float64)
        weights[group] = (values - kernel.zero[group]) * kernel.scale[group].astype(np.float64)
    return weights.reshape(groups * size, -1)


def test_int8_kernels_are_rounded_to_the_nearest_multiple_of_their_scale() -> None:
    w = np.random.default_rng(0).normal(size=(2, 24, 5)).astype(np.float32)
    w[1, :, 3] = 0
    kernel = jax.device_get(jax.jit(quantize_int8)(jax.device_put(w)))
    scale = np.abs(w).max(1) / 127
    error = np.abs(kernel.values.astype(np.float64) * kernel.scale[:, None] - w)
    assert (error <= scale[:, None] * 0.5 * (1 + 1e-4)).all()
    assert np.abs(kernel.values).max(1).tolist() == [[127] * 5, [127] * 3 + [0, 127]]


def test_int4_kernels_are_the_nearest_of_sixteen_values_in_each_group() -> None:
    """The range of a group shrinks only if that reduces its squared error."""
    w = np.random.default_rng(0).normal(size=(2, 384, 5)).astype(np.float32)
    w[0, :, 1], w[1, 128:256, 3] = 0, np.abs(w[1, 128:256, 3])
    kernel = jax.device_get(jax.jit(quantize_int4)(jax.device_put(w)))
    assert kernel.scale.shape == kernel.zero.shape == (2, 3, 5)
    assert kernel.shape == w.shape
    found = np.stack([unpacked(kernel[layer]) for layer in range(2)]).reshape(2, 3, 128, 5)
    groups = w.reshape(2, 3, 128, 5).astype(np.float64)
    scale, zero = kernel.scale[:, :, None], kernel.zero[:, :, None].astype(np.float64)
    nearest = (np.clip(np.round(groups / scale) + zero, 0, 15) - zero) * scale
    np.testing.assert_allclose(found, nearest, atol=1e-6)
    low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
    whole = np.where(high > low, (high - low) / 15, 1)
    np.testing.assert_array_equal(zero[:, :, 0], np.round(-low / whole))
    assert kernel.zero[1, 1, 3] == 0
    steps = np.clip(np.round(groups / whole[:, :, None]) + zero, 0, 15) - zero
    unclipped = np.square(steps * whole[:, :, None] - groups).sum(2)
    error = np.square(found - groups).sum(2)
    assert (error <= unclipped * (1 + 1e-5)).all()
    assert error.sum() < 0.95 * unclipped.sum()


def make_kernel(dtype: str, draw: np.random.Generator) -> tuple[QuantizedKernel, np.ndarray]:
    """Return a kernel [48, 16] of NumPy arrays, and its weights in float64."""
    if dtype == "int8":
        values = draw.integers(-127, 128, (48, 16), np.int8)
        scale = draw.uniform(0.5, 2, 16).astype(np.float32)
        return Int8Kernel(values, scale), values * scale.astype(np.float64)
    kernel = Int4Kernel(
        draw.integers(0, 256, (24, 16), np.uint8),
        draw.uniform(0.5, 2, (3, 16)).astype(np.float32),
        draw.integers(0, 17, (3, 16), np.uint8),
    )
    return kernel, unpacked(kernel)


@pytest.mark.parametrize("rows", [(3, 5), (2, 1)])
@pytest.mark.parametrize(("input_dtype", "bound"), [("float32", 2e-5), ("bfloat16", 8e-3)])
def test_products_and_gradients_are_those_of_the_dequantized_kernel(
    dtype: str, rows: tuple[int, ...], input_dtype: str, bound: float
) -> None:
    """The bound of float32 is that of inputs of 15 bits, of bfloat16 the rounding of weights."""
    draw = np.random.default_rng(1)
    x64 = draw.normal(size=(*rows, 48))
    x64[..., 7] = 40
    x64[0, 0] = 0
    x64 = np.asarray(x64.astype(input_dtype), np.float64)
    dy64 = np.asarray(draw.normal(size=(*rows, 16)).astype(input_dtype), np.float64)
    kernel, w64 = make_kernel(dtype, draw)

    @jax.jit
    def product(x: jax.Array, dy: jax.Array, w: QuantizedKernel) -> Any:
        y, pull = jax.vjp(lambda x: quantized_matmul(SHARDING, x, w), x)
        return y, pull(dy)[0]

    y, dx = product(*jax.device_put((x64.astype(input_dtype), dy64.astype(input_dtype), kernel)))
    for found, expected, bounds in (
        (y, x64 @ w64, np.abs(x64).max(-1, keepdims=True) * np.abs(w64).sum(0)),
        (dx, dy64 @ w64.T, np.abs(dy64) @ np.abs(w64.T)),
    ):
        assert found.dtype == input_dtype
        assert (np.abs(np.asarray(found, np.float64) - expected) <= bound * bounds).all()


def test_a_quantized_model_computes_as_its_dequantized_parameters(
    tiny: GPTConfig, params: Params, quantized: Params, tokens: jax.Array
) -> None:
    kinds = [leaf.dtype for leaf in jax.tree.leaves(quantized) if leaf.ndim == 3]
    values = jnp.int8 if jnp.int8 in kinds else jnp.uint8
    assert kinds.count(values) == (6 if values == jnp.int8 else 12)  # query, key, ..., down
    logits = jax.jit(lambda params: bind(tiny, params)(tokens))
    close, expected, before = jax.device_get(
        [logits(quantized), logits(dense(quantized)), logits(params)]
    )
    assert np.abs(close - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(expected - before).max() > 1e-3 * np.abs(before).max()
    prompts = jax.device_put(np.arange(10, dtype=np.int32).reshape(2, 5))
    lengths = jax.device_put(np.array([5, 3], np.int32))
    new = [
        jax.device_get(generate(tiny, each, prompts, lengths, max_new_tokens=8))
        for each in (quantized, dense(quantized))
    ]
    assert (new[0] == new[1]).all()
    narrow = dataclasses.replace(tiny, dtype="bfloat16")
    assert generate(narrow, quantized, prompts, lengths, max_new_tokens=8).shape == (2, 8)


def test_adapters_train_on_a_quantized_base(
    tiny: GPTConfig, quantized: Params, tokens: jax.Array
) -> None:
    @jax.jit
    def made(base: Params) -> Any:
        adapters = lora.init(tiny, LORA, jax.random.key(1), base)
        return jax.tree.map(lambda x: x + 0.01, adapters)

    @jax.jit
    def gradients(base: Params, adapters: Any) -> Any:
        def loss(adapters: Any) -> jax.Array:
            return jnp.square(lora.bind(tiny, LORA, base, adapters)(tokens)).mean()

        return jax.grad(loss)(adapters)

    adapters, float_base = made(quantized), dense(quantized)
    found, expected = jax.device_get(
        [gradients(base, adapters) for base in (quantized, float_base)]
    )
    for close, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(exact).max() > 0
        assert np.abs(close - exact).max() <= 1e-3 * np.abs(exact).max()
    merge = jax.jit(lora.merge, static_argnums=2)
    merged = jax.device_get([merge(base, adapters, LORA) for base in (quantized, float_base)])
    jax.tree.map(np.testing.assert_array_equal, *merged)


def test_parameters_of_another_model_are_refused(
    tiny: GPTConfig, params: Params, quantized: Params
) -> None:
    wider = dataclasses.replace(tiny, d_ff=48)
    shapes = jax.eval_shape(lambda: init(tiny, jax.random.key(0)))
    message = r"params blocks\.mlp\.up\.kernel: got shape \[2, 24, 96\]; expected \[2, 24, 48\]"
    with pytest.raises(ValueError, match=message):
        quantize(wider, shapes)
    with pytest.raises(ValueError, match=message):
        bind(wider, quantized)
    with pytest.raises(ValueError, match=r"dtype: got 'int3'; expected one of \['int8', 'int4'\]"):
        quantize(tiny, params, "int3")
    with pytest.raises(ValueError, match=r"got 5 inputs; expected an even number for int4"):
        jax.eval_shape(lambda: quantize_int4(jnp.ones((5, 2))))
