"""Backend contract for the plain JAX backends, grouped heads and forward mode."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import AttentionContract, Case, assert_agrees, draw
from attention_oracle import oracle

from tjx_kernels import flash_attention
from tjx_kernels.attention.call import describe_call


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


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_sink_is_a_key_with_the_value_zero(implementation: str) -> None:
    inputs = draw(13, Case((2, 37, 40, 4, 2)), 8)
    inputs["dlse"][:] = 0
    sinks = np.array([-1, 0.5, 2, 4], np.float32)

    @jax.jit
    def run(q: Any, k: Any, v: Any, sinks: Any, dout: Any) -> Any:
        def attend(q: Any, k: Any, v: Any, sinks: Any) -> Any:
            options: Any = {"causal": True, "q_offset": -3, "implementation": implementation}
            return flash_attention(q, k, v, sinks=sinks, **options)

        out, pull = jax.vjp(attend, q, k, v, sinks)
        return out, *pull(dout)

    operands = [inputs["q"], inputs["k"], inputs["v"], sinks, inputs["dout"]]
    found = jax.device_get(run(*jax.device_put(operands)))
    # The oracle has no sinks: a first key of zeros, whose score is the bias. Two rows are dead.
    keys = {x: np.pad(inputs[x], ((0, 0), (1, 0), (0, 0), (0, 0))) for x in "kv"}
    bias = np.zeros((1, 4, 37, 41), np.float32)
    bias[..., 0] = sinks[:, None]
    wanted = oracle({**inputs, **keys, "bias": bias}, causal=True, q_offset=-2)
    dsinks = wanted["dbias"][0, :, :, 0].sum(-1)
    expected = {"out": wanted["out"], "dq": wanted["dq"], "dk": wanted["dk"][:, 1:]}
    expected |= {"dv": wanted["dv"][:, 1:], "dsinks": dsinks}
    assert np.abs(dsinks).min() > 0.01
    assert_agrees(dict(zip(expected, found, strict=True)), expected, 1e-5)
    # Backends without a differentiable LSE do not support it.
    assert describe_call(*operands[:3], sinks=sinks).return_lse
