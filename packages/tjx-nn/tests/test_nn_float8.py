"""FP8 products against float64 products of quantized operands."""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_nn import GPTConfig, bind, init
from tjx_nn.config import TransformerConfig
from tjx_nn.layers.float8 import E4M3, E5M2, ScaledTensor, float8_matmul, quantize
from tjx_nn.layout import SINGLE_DEVICE, ParamSharding

TINY = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=16, dtype="bfloat16")


def oracle(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Round with the largest power of two that keeps the values in range; in float64."""
    largest = {E4M3: 448, E5M2: 57344}[dtype]
    scale = 2.0 ** np.floor(np.log2(largest / np.abs(x.astype(np.float64)).max()))
    values: np.ndarray = (x.astype(np.float64) * scale).astype(jnp.dtype(dtype)).astype(
        np.float64
    ) / scale
    return values


def normal(*shape: int, seed: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize(("dtype", "name"), [(E4M3, "float8_e4m3fn"), (E5M2, "float8_e5m2")])
def test_quantization_scales_by_a_power_of_two_at_any_magnitude(dtype: Any, name: str) -> None:
    round_it = jax.jit(partial(quantize, dtype=dtype))
    for magnitude in (1e-30, 1e-6, 1.0, 3e4):
        x = normal(64, seed=0, scale=magnitude)
        found: ScaledTensor = round_it(jax.device_put(x))
        assert found.values.dtype.name == name
        inverse = float(found.inverse)
        assert np.frexp(inverse)[0] == 0.5
        values = np.asarray(found.values).astype(np.float64) * inverse
        np.testing.assert_array_equal(values, oracle(x, dtype))
    zeros: ScaledTensor = round_it(jax.device_put(np.zeros(64, np.float32)))
    assert not np.asarray(zeros.values).astype(np.float32).any()
    for wrong in (np.inf, np.nan):
        x[3] = wrong
        found = round_it(jax.device_put(x))
        assert np.isnan(np.asarray(found.values).astype(np.float32)).any()


def test_forward_and_gradients_equal_products_of_quantized_operands() -> None:
    x, w = normal(2, 5, 32, seed=0), normal(32, 16, seed=1, scale=0.02)
    dy = normal(2, 5, 16, seed=2, scale=1e-7)

    @jax.jit
    def both(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(partial(float8_matmul, ParamSharding(SINGLE_DEVICE, (None, None))), x, w)
        return y, *pull(dy)

    found = jax.device_get(both(*jax.device_put((x, w, dy))))
    rows, weight = oracle(x, E4M3), oracle(w, E4M3)
    gradient = oracle(dy, E5M2)
    expected = rows @ weight, gradient @ weight.T, np.einsum("bti,bto->io", rows, gradient)
    for ours, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max())


def test_exactly_the_projections_of_a_block_use_fp8() -> None:
    config = dataclasses.replace(TINY, float8=True, scan_layers=True)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return bind(config, params).losses(tokens, tokens).tokens.mean()

    with jax.transfer_guard("allow"):
        params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
        tokens = jax.eval_shape(lambda: jnp.zeros((2, 8), jnp.int32))
        text = jax.jit(jax.value_and_grad(loss)).lower(params, tokens).as_text()
    products = re.findall(r"dot_general .*: \(tensor<(\S+)>, tensor<(\S+)>\)", text)
    kinds = [{each.rsplit("x", 1)[1] for each in pair} for pair in products]
    # Query, key, value, output, up and down; the scan body occurs once in each pass.
    assert kinds.count({"f8E4M3FN"}) == 6
    assert kinds.count({"f8E4M3FN", "f8E5M2"}) == 12
    assert {"bf16"} in kinds  # the head


def test_experts_raise() -> None:
    experts = dataclasses.replace(TransformerConfig().experts, count=4)
    with pytest.raises(ValueError, match=r"float8: got True with experts.count 4"):
        GPTConfig(vocab_size=11, float8=True, experts=experts)
