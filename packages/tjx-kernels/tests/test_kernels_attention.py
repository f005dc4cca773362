"""Backend contract for the plain JAX backends, grouped heads and forward mode."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_contract import AttentionContract, Case, draw

from tjx_kernels import flash_attention


class TestXla(AttentionContract):
    implementation = "xla"


class TestReference(AttentionContract):
    implementation = "reference"


def test_grouped_heads_share_neighbouring_keys() -> None:
    inputs = draw(11, Case((1, 6, 6, 4, 2)), 8)
    spread = {**inputs, **{x: inputs[x].repeat(2, axis=2) for x in ("k", "v")}}
    grouped, full = (TestXla().compute(x) for x in (inputs, spread))
    np.testing.assert_allclose(grouped["out"], full["out"], atol=1e-6)
    wrong = {**inputs, **{x: np.concatenate([inputs[x]] * 2, axis=2) for x in ("k", "v")}}
    assert not np.allclose(TestXla().compute(wrong)["out"], full["out"], atol=1e-2)


def test_forward_mode_works_in_the_reference() -> None:
    inputs = draw(12, Case((1, 5, 5, 2, 2)), 4)
    call: Any = partial(flash_attention, causal=True, implementation="reference")
    arrays = jax.device_put([inputs[x] for x in ("q", "k", "v")])
    _, tangent = jax.jit(lambda *x: jax.jvp(call, x, x))(*arrays)
    assert np.all(np.isfinite(jax.device_get(tangent)))
    assert jnp.isdtype(tangent.dtype, "real floating")
