"""Decoding weights: views on CPUs, equal tokens on all devices, casts."""

from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tjx_nn import GPTConfig, generate
from tjx_nn.binding import Params
from tjx_nn.generation.decode_weights import make_decode_weights

Make = Callable[..., Params]


def _continue(config: GPTConfig, params: Params) -> np.ndarray:
    tokens = generate(
        config, params, np.array([[1, 2], [3, 4]], np.int32),
        np.array([2, 1], np.int32), max_new_tokens=6,
    )  # fmt: skip
    return np.asarray(jax.device_get(tokens))


def test_blocks_are_views_on_a_cpu(tiny: GPTConfig, make: Make) -> None:
    params = make(tiny)
    stack = params["blocks"]["mlp"]["up"]["kernel"]
    blocks = make_decode_weights(tiny, params).blocks
    starts = [block.mlp.up.kernel[...].unsafe_buffer_pointer() for block in blocks]
    size = stack.nbytes // tiny.n_layer
    assert starts == [stack.unsafe_buffer_pointer() + i * size for i in range(tiny.n_layer)]


def test_views_outlive_the_donation_of_the_parameters(tiny: GPTConfig, make: Make) -> None:
    params = make(tiny)
    blocks = make_decode_weights(tiny, params).blocks
    before = jax.device_get(params)
    zeroed = jax.jit(lambda p: jax.tree.map(lambda x: x * 0, p), donate_argnums=0)(params)
    jax.device_get(zeroed)
    for i, block in enumerate(jax.device_get(blocks)):
        kernel = before["blocks"]["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(block.mlp.up.kernel[...], kernel[i])


def test_tokens_do_not_depend_on_the_device_of_the_parameters(tiny: GPTConfig, make: Make) -> None:
    params = make(tiny)
    wanted = _continue(tiny, params)
    with jax.transfer_guard("allow"):
        np.testing.assert_array_equal(_continue(tiny, jax.device_get(params)), wanted)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    whole = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]  # as jax is
    np.testing.assert_array_equal(_continue(tiny, jax.device_put(params, whole)), wanted)


def test_matrices_are_cast_and_norms_are_not(tiny: GPTConfig, make: Make) -> None:
    config = replace(tiny, dtype="bfloat16")
    params = make(tiny)
    for i, block in enumerate(make_decode_weights(config, params).blocks):
        assert block.attention.query.kernel[...].dtype == "bfloat16"
        assert block.ln_1.scale[...].dtype == "float32"
        scale = jax.device_get(block.ln_1.scale[...])
        np.testing.assert_array_equal(scale, jax.device_get(params["blocks"]["ln_1"]["scale"])[i])
