"""Layers against their definitions."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from tjx_nn import MLP, Attention, Block, Embedding, GPTConfig, LayerNorm, SwiGLU
from tjx_nn.binding import Params
from tjx_nn.layers.gated_mlp import apply_gate
from tjx_nn.layers.linear import add_bias, matmul
from tjx_nn.layers.mlp import gelu_erf, gelu_tanh
from tjx_nn.layers.moe import expert_matmul
from tjx_nn.layers.norms import _normalize
from tjx_nn.layout import SINGLE_DEVICE, ParamSharding

Function = Callable[[jax.Array], jax.Array]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make(build: Callable[[], Any]) -> Any:
    with jax.transfer_guard("allow"):
        return build()


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_layer_norm_keeps_its_accuracy_far_from_zero(shift: float) -> None:
    x = normal(4, 64) + np.float32(shift)
    exact = x.astype(np.float64)
    exact = exact - exact.mean(-1, keepdims=True)
    exact = exact / np.sqrt(np.square(exact).mean(-1, keepdims=True) + 1e-5)
    found = jax.jit(make(lambda: LayerNorm(64)))(jax.device_put(x))
    np.testing.assert_allclose(np.asarray(found), exact, atol=2e-3 if shift else 2e-6)


def test_layer_norm_of_bfloat16_keeps_its_accuracy_far_from_zero() -> None:
    """The cancellation of the one-pass variance is below the rounding of bfloat16."""
    x = (4 * normal(4, 768) + 300).astype(jnp.bfloat16)
    exact = x.astype(np.float64)
    exact = exact - exact.mean(-1, keepdims=True)
    exact = exact / np.sqrt(np.square(exact).mean(-1, keepdims=True) + 1e-5)
    found = jax.jit(make(lambda: LayerNorm(768)))(jax.device_put(x))
    # Half a unit in the last place of bfloat16, and what float32 cancels: 300**2 * 2**-24 of 16.
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=2e-3)


def test_layer_norm_of_constant_input_is_its_bias_with_finite_gradients() -> None:
    norm = make(lambda: LayerNorm(8))
    x = jax.device_put(np.full((1, 8), 3, np.float32))
    assert np.all(np.asarray(jax.jit(norm)(x)) == 0)
    assert np.isfinite(np.asarray(jax.jit(jax.grad(lambda x: norm(x).max()))(x))).all()


def test_layer_norm_without_bias_has_none() -> None:
    with_bias, without = make(lambda: (LayerNorm(8), LayerNorm(8, bias=False)))
    assert len(jax.tree.leaves(nnx.state(with_bias))) == 2
    assert len(jax.tree.leaves(nnx.state(without))) == 1


@pytest.mark.parametrize(
    ("centre", "has_bias"), [(True, True), (True, False), (False, False)], ids=str
)
def test_gradients_of_norms_equal_those_of_the_definition(centre: bool, has_bias: bool) -> None:
    # Arguments: x, scale and bias.
    def formula(x: Any, scale: Any, bias: Any) -> Any:
        y = x - x.mean(-1, keepdims=True) if centre else x
        y = y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + 0.1) * scale[None, None]
        return y if bias is None else y + bias[None, None]

    def both(function: Callable[..., Any], x: Any, scale: Any, bias: Any, dy: Any) -> Any:
        y, pull = jax.vjp(function, x, scale, bias)
        return y, pull(dy)

    x, dy = normal(3, 5, 8) + 1, normal(3, 5, 8, seed=1)
    inputs = jax.device_put((x, normal(8), normal(8, seed=2) if has_bias else None, dy))

    def ours(x: Any, scale: Any, bias: Any) -> Any:
        return _normalize(x, scale, bias, 0.1, centre)

    found, expected = (jax.jit(partial(both, f))(*inputs) for f in (ours, formula))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), found, expected)


def test_layer_norm_of_half_precision_takes_statistics_in_float32() -> None:
    # In bfloat16 the sum of 4096 ones does not get beyond 256.
    x = (1 + 0.5 * np.sign(normal(1, 4096))).astype(jnp.bfloat16)
    y = np.asarray(jax.jit(make(lambda: LayerNorm(4096)))(jax.device_put(x)), np.float32)
    assert abs(y.mean()) < 1e-2
    assert abs(y.std() - 1) < 1e-2


@pytest.mark.parametrize(("ours", "approximate"), [(gelu_erf, False), (gelu_tanh, True)])
def test_gelu_and_its_derivative(ours: Function, approximate: bool) -> None:
    x = jax.device_put(np.linspace(-8, 8, 201, dtype=np.float32))

    def both(f: Function) -> Any:
        return jax.device_get(jax.jit(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),)))(x))

    expected = both(lambda x: jax.nn.gelu(x, approximate=approximate))
    np.testing.assert_allclose(both(ours), expected, atol=3e-6)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_gradients_of_linear_layers_against_finite_differences(shape: tuple[int, int]) -> None:
    kept = ParamSharding(SINGLE_DEVICE, (None, None))

    with jax.transfer_guard("allow"):
        for function, arguments in (
            (matmul, (normal(2, 5, shape[0]), normal(*shape))),
            (add_bias, (normal(2, 5, shape[1]), normal(shape[1]))),
            (expert_matmul, (normal(2, 3, 4, shape[0]), normal(2, *shape))),
        ):
            check_grads(jax.jit(partial(function, kept)), arguments, 1, modes=["rev"], eps=1.0)  # type: ignore[no-untyped-call]  # as jax is


def test_weight_gradients_are_summed_in_float32_for_any_dtype() -> None:
    kept = ParamSharding(SINGLE_DEVICE, (None, None))
    x, dy = normal(4096, 8), normal(4096, 8, seed=1)

    def gradient(x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
        x, dy = x.astype("bfloat16"), dy.astype("bfloat16")
        dw: jax.Array = jax.vjp(lambda w: matmul(kept, x, w), w)[1](dy)[0]
        return dw

    dw = jax.jit(gradient)(*jax.device_put((x, normal(8, 8), dy)))
    rounded = [np.asarray(each.astype("bfloat16"), np.float32) for each in (x, dy)]
    exact = rounded[0].T @ rounded[1]
    assert dw.dtype == np.float32
    # Rounded to bfloat16 the sums would be off by up to 2**-9 of themselves.
    np.testing.assert_allclose(np.asarray(dw), exact, rtol=1e-4, atol=1e-3)


def test_gates_of_swiglu_and_geglu_and_mlp_raises_for_gated_activations() -> None:
    x = jax.device_put(normal(2, 3, 8))

    def output(activation: Any) -> np.ndarray:
        config = GPTConfig(n_head=2, d_model=8, d_ff=16, activation=activation)
        layer = make(lambda: SwiGLU(config, rngs=nnx.Rngs(0)))
        return np.asarray(jax.device_get(jax.jit(layer)(x)))

    np.testing.assert_array_equal(output("gelu_tanh"), output("swiglu"))
    assert abs(output("geglu") - output("swiglu")).max() > 1e-6
    with pytest.raises(ValueError, match=r"activation: got 'swiglu' for MLP; .* use SwiGLU"):
        make(lambda: MLP(GPTConfig(activation="swiglu"), rngs=nnx.Rngs(0)))


def test_clamped_swiglu_equals_numpy() -> None:
    gate, up = (np.linspace(-9, 9, 37, dtype=np.float32)[::step] for step in (1, -1))
    config = GPTConfig(activation="clamped_swiglu", swiglu_limit=4.0)
    found = jax.jit(partial(apply_gate, config))(*jax.device_put((gate, up)))
    below = np.minimum(gate.astype(np.float64), 4)
    expected = (np.clip(up, -4, 4) + 1) * below / (1 + np.exp(-1.702 * below))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-6)


def test_embedding_clips_ids_to_its_table() -> None:
    table = make(lambda: Embedding(5, 3, axes=("vocab", "embed"), std=0.02, rngs=nnx.Rngs(0)))
    rows = np.asarray(jax.jit(table)(jax.device_put(np.array([-1, 0, 4, 9], np.int32))))
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[2], rows[3])


def test_layers_take_their_sizes_without_a_configuration() -> None:
    config = GPTConfig(n_head=4, n_kv_head=2, d_model=16, d_ff=20, positions="none")
    x = jax.device_put(normal(2, 5, 16))
    for own, full in (
        (
            lambda: Attention(16, n_head=4, n_kv_head=2, rngs=nnx.Rngs(0)),
            lambda: Attention(config, rngs=nnx.Rngs(0)),
        ),
        (
            lambda: Block(16, n_head=4, n_kv_head=2, d_ff=20, rngs=nnx.Rngs(0)),
            lambda: Block(config, rngs=nnx.Rngs(0)),
        ),
        (
            lambda: Block(config, n_head=8, d_ff=24, rngs=nnx.Rngs(0)),
            lambda: Block(dataclasses.replace(config, n_head=8, d_ff=24), rngs=nnx.Rngs(0)),
        ),
    ):
        found, expected = (
            jax.jit(lambda layer, x: layer(x)[0])(make(each), x) for each in (own, full)
        )
        np.testing.assert_array_equal(*jax.device_get((found, expected)))


def test_grouped_query_attention_equals_repeated_keys_and_values() -> None:
    grouped_config = GPTConfig(n_head=4, n_kv_head=2, d_model=16)
    grouped = make(lambda: Attention(grouped_config, rngs=nnx.Rngs(0)))
    full = make(lambda: Attention(GPTConfig(n_head=4, d_model=16), rngs=nnx.Rngs(0)))
    shared = nnx.to_pure_dict(nnx.state(grouped))

    @jax.jit
    def outputs(shared: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        repeated = {
            name: {"kernel": shared[name]["kernel"].reshape(16, 2, 4).repeat(2, 1).reshape(16, 16)}
            for name in ("key", "value")
        }
        biases = {"bias": jnp.zeros(16)}
        whole = {name: kernel | biases for name, kernel in repeated.items()}
        ungrouped = nnx.merge(nnx.graphdef(full), shared | whole)
        return nnx.merge(nnx.graphdef(grouped), shared)(x)[0], ungrouped(x)[0]

    found, expected = jax.device_get(outputs(shared, jax.device_put(normal(2, 7, 16))))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_head_gates_are_sigmoids_of_the_first_features() -> None:
    config = GPTConfig(n_head=4, d_model=16, attention_gate=3, bias=False)
    plain_config = dataclasses.replace(config, attention_gate=None)
    gated = make(lambda: Attention(config, rngs=nnx.Rngs(0)))
    plain = make(lambda: Attention(plain_config, rngs=nnx.Rngs(0)))
    x, kernel = normal(2, 7, 16), normal(3, 4, seed=1)

    @jax.jit
    def outputs(params: Params, kernel: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        params = params | {"out": {"kernel": jnp.eye(16)}}
        without = nnx.merge(nnx.graphdef(plain), {k: v for k, v in params.items() if k != "gate"})
        first = nnx.merge(nnx.graphdef(gated), params)
        trained = nnx.merge(nnx.graphdef(gated), params | {"gate": {"linear": {"kernel": kernel}}})
        return without(x)[0], first(x)[0], trained(x)[0]

    given = jax.device_put((kernel, x))
    plain_y, first_y, y = jax.device_get(outputs(nnx.to_pure_dict(nnx.state(gated)), *given))
    np.testing.assert_array_equal(first_y, plain_y)
    gates = 2 / (1 + np.exp(-x[..., :3].astype(np.float64) @ kernel))
    np.testing.assert_allclose(y, plain_y * gates.repeat(4, -1), atol=1e-6)
