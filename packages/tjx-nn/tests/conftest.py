"""Tiny GPT shared by tests, so that it is compiled once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_nn import GPTConfig, TransformerConfig, bind, init
from tjx_nn.binding import Params

# Grouped-query attention; all sizes differ.
TINY = GPTConfig(vocab_size=23, max_seq_len=16, n_layer=2, n_head=4, n_kv_head=2, d_model=24)


def make_params(config: TransformerConfig, seed: int = 0) -> Params:
    """Random parameters with the shapes of init, so that no bias is 0 and no scale is 1."""
    rng = np.random.default_rng(seed)

    def noisy(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> Any:
        is_scale = path[-1].key == "scale"
        return (is_scale + 0.2 * rng.standard_normal(shape.shape)).astype(np.float32)

    with jax.transfer_guard("allow"):
        shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params: Params = jax.device_put(jax.tree.map_with_path(noisy, shapes))
    return params


@functools.partial(jax.jit, static_argnames="config")
def logits(config: Any, params: Params, inputs: tuple[Any, ...], kwargs: Any) -> jax.Array:
    found: jax.Array = bind(config, params)(*inputs, **kwargs)
    return found


@pytest.fixture(scope="session")
def tiny() -> GPTConfig:
    return TINY


@pytest.fixture(scope="session")
def params() -> Params:
    return make_params(TINY)


@pytest.fixture
def tokens() -> Any:
    rows = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, TINY.max_seq_len))
    return jax.device_put(rows.astype(np.int32))


@pytest.fixture(scope="session")
def make() -> Callable[..., Params]:
    return make_params


@pytest.fixture(scope="session")
def run() -> Callable[..., np.ndarray]:
    """Compiled forward pass of any model: run(config, params, *inputs, **inputs) -> NumPy."""

    def call(config: TransformerConfig, params: Params, *inputs: Any, **kwargs: Any) -> np.ndarray:
        found = logits(config, params, *jax.device_put((inputs, kwargs)))
        return np.asarray(jax.device_get(found))

    return call


@pytest.fixture(scope="session")
def descend() -> Callable[..., list[float]]:
    """Twenty steps of sign descent: descend(loss, params) -> losses."""

    def run(loss: Callable[[Params], jax.Array], params: Params) -> list[float]:
        @jax.jit
        def step(params: Params) -> Any:
            value, gradients = jax.value_and_grad(loss)(params)
            # Sign descent: the step does not depend on the scale of a layer.
            moved = jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, gradients)
            return value, moved

        losses = []
        for _ in range(20):
            value, params = step(params)
            losses.append(value)
        return [float(value) for value in jax.device_get(losses)]

    return run


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Return a function that adds a property to a JUnit report, for tools/golden/golden_table.py.

    pytest's own fixture warns if the report has no properties of tests.
    """
    return lambda name, value: request.node.user_properties.append((name, str(value)))
