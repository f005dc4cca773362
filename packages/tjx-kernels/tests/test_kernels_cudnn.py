"""cuDNN backend: the semantics that it passes to cuDNN, and the calls that it rejects.

It does not run without a GPU. The same call of `jax.nn` runs in XLA instead, and what would go to
cuDNN is read from the lowered program.
"""

import json
import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tjx_kernels import flash_attention
from tjx_kernels.attention.backends.cudnn import BACKEND
from tjx_kernels.attention.call import AttentionCall, Operands, describe_call


def shaped(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)  # type: ignore[no-untyped-call]


def call_on_gpu(q_len: int = 32, kv_len: int = 32, **options: Any) -> AttentionCall:
    q, kv = shaped(2, q_len, 4, 64), shaped(2, kv_len, 2, 64)
    call = describe_call(q=q, k=kv, v=kv, **options)
    return replace(call, platform="gpu", architecture="sm_90")


# --- what reaches cuDNN ---------------------------------------------------------------------------


@pytest.fixture
def _cudnn_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    # jax asks the installed cuDNN for its version while it traces.
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91100)


def attend(call: AttentionCall, q: Any, k: Any, v: Any) -> Any:
    return BACKEND.run(call, Operands(q, k, v))[0]


def loss(call: AttentionCall, q: Any, k: Any, v: Any) -> Any:
    return jnp.sum(attend(call, q, k, v).astype(jnp.float32) ** 2)


def operands_of(call: AttentionCall) -> list[Any]:
    kv = shaped(call.batch, call.kv_len, call.kv_heads, call.head_dim)
    return [shaped(call.batch, call.q_len, call.heads, call.head_dim), kv, kv]


@pytest.mark.usefixtures("_cudnn_is_there")
@pytest.mark.parametrize(
    ("options", "mask", "window"),
    [
        ({"scale": 0.3}, "NO_MASK", 0),
        ({"scale": 0.3, "causal": True}, "CAUSAL", 0),
        ({"scale": 0.3, "causal": True, "window": 8}, "CAUSAL", 8),
    ],
)
def test_lowers_to_cudnn_with_the_arguments(options: Any, mask: str, window: int) -> None:
    call = call_on_gpu(**options)
    assert BACKEND.supports(call) is None
    names = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    exported = jax.export.export(
        jax.jit(jax.grad(partial(loss, call), argnums=(0, 1, 2))),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name) for name in names],
    )(*operands_of(call))
    calls = re.findall(r'@(__cudnn\$\w+)\(.*?backend_config = "(.*?)",', exported.mlir_module())
    assert [name for name, _ in calls] == names
    for _, text in calls:
        config = json.loads(text.replace("\\22", '"'))["cudnn_fmha_backend_config"]
        assert config["fmha_scale"] == 0.3
        assert config["mask_type"] == mask
        assert config["sliding_window_length"] == window
        assert config["dropout_rate"] == 0
        assert config["is_flash_attention"]


def count(name: str, function: Any, call: AttentionCall) -> int:
    return str(jax.make_jaxpr(function)(*operands_of(call))).count(name)


@pytest.mark.usefixtures("_cudnn_is_there")
def test_remat_policy_that_saves_both_names_runs_forward_once() -> None:
    call = call_on_gpu(causal=True)
    names = ("flash_attention_out", "flash_attention_lse")
    for kept, runs in ((names, 1), (names[:1], 2), (names[1:], 2), ((), 2)):
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        run = jax.checkpoint(partial(loss, call), policy=policy)
        gradient = jax.grad(run, argnums=(0, 1, 2))
        assert count("dot_product_attention_fwd_wrapper", gradient, call) == runs
        assert count("dot_product_attention_bwd_wrapper", gradient, call) == 1


@pytest.mark.usefixtures("_cudnn_is_there")
@pytest.mark.parametrize("axis", [0, 1, 2, 4])
def test_any_axis_may_be_vmapped(axis: int) -> None:
    """cuDNN's own rule takes the first axis alone; both passes must bring it there."""
    call = call_on_gpu(causal=True)
    q, k, v = operands_of(call)
    many = shaped(*np.insert(q.shape, axis, 3).tolist())
    gradient = jax.vmap(
        jax.grad(partial(loss, call), argnums=(0, 1, 2)), in_axes=(axis, None, None)
    )
    found = jax.eval_shape(gradient, many, k, v)
    assert [x.shape for x in found] == [(3, *x.shape) for x in (q, k, v)]

    def of_many_cotangents(dout: Any, *operands: Any) -> Any:
        _, pull = jax.vjp(partial(attend, call), *operands)
        return jax.vmap(pull, in_axes=axis)(dout)

    found = jax.eval_shape(of_many_cotangents, many, q, k, v)
    assert [x.shape for x in found] == [(3, *x.shape) for x in (q, k, v)]


# --- what it means --------------------------------------------------------------------------------


@pytest.fixture
def _xla_in_place_of_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    function = jax.nn.dot_product_attention

    def in_xla(*operands: Any, implementation: str, **options: Any) -> Any:
        assert implementation == "cudnn"
        return function(*operands, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)


@pytest.mark.usefixtures("_xla_in_place_of_cudnn")
@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((37, 45), {}),
        ((37, 45), {"scale": 0.3, "causal": True}),
        ((45, 37), {"causal": True}),
        ((40, 45), {"causal": True, "window": 7}),
    ],
)
def test_agrees_with_the_reference(lengths: tuple[int, int], options: Any) -> None:
    call = call_on_gpu(*lengths, **options)
    assert BACKEND.supports(call) is None
    # In float32, which cuDNN itself refuses, so that a difference of meaning stands out.
    call = replace(call, dtype="float32")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(x.shape).astype(np.float32) for x in operands_of(call))
    dout = rng.standard_normal(q.shape).astype(np.float32)

    reference = partial(flash_attention, implementation="reference", **options)

    def results(function: Any) -> Any:
        def run(dout: Any, *operands: Any) -> Any:
            out, pull = jax.vjp(function, *operands)
            return (out, *pull(dout))

        return jax.device_get(jax.jit(run)(*jax.device_put((dout, q, k, v))))

    for a, b in zip(results(partial(attend, call)), results(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@given(
    q_len=st.integers(1, 20),
    kv_len=st.integers(1, 20),
    q_offset=st.sampled_from([0, 0, 0, None, -5, 5]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 20),
)
def test_calls_with_dead_rows_are_unsupported(
    q_len: int, kv_len: int, q_offset: int | None, causal: bool, window: int | None
) -> None:
    """It gives such rows the mean of the values."""
    call = call_on_gpu(q_len, kv_len, causal=causal, window=window)
    call = replace(call, q_offset=q_offset)
    if BACKEND.supports(call) is not None:
        return
    distance = np.subtract.outer(np.arange(q_len), np.arange(kv_len))  # q_offset 0, or no mask
    seen = np.ones(distance.shape, bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    assert np.all(np.any(seen, axis=1))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"architecture": "sm_80"}, None),
        ({"dtype": "float16"}, None),
        ({"head_dim": 256, "v_head_dim": 256}, None),
        ({"q_offset": None}, None),  # without a mask positions mean nothing
        ({"causal": True, "kv_len": 50}, None),
        ({"platform": "cpu", "architecture": ""}, "needs an NVIDIA GPU of sm_80 or later"),
        ({"platform": "tpu", "architecture": "TPU v5 lite"}, "needs an NVIDIA GPU"),
        ({"architecture": ""}, "needs an NVIDIA GPU of sm_80 or later"),
        ({"architecture": "sm_75"}, "needs an NVIDIA GPU of sm_80 or later"),
        ({"dtype": "float32"}, "needs bfloat16 or float16"),
        ({"dtype": "float64"}, "needs bfloat16 or float16"),
        ({"head_dim": 60, "v_head_dim": 60}, "multiple of 8"),
        ({"architecture": "sm_80", "head_dim": 256, "v_head_dim": 256}, "at most 128"),
        ({"architecture": "sm_100", "head_dim": 256, "v_head_dim": 256}, "at most 128"),
        ({"head_dim": 264, "v_head_dim": 264}, "at most 256"),
        ({"v_head_dim": 128}, "v_head_dim equal to head_dim"),
        ({"return_lse": True}, "its LSE has no derivative"),
        ({"segment_ids": True}, "a mask of q_len x kv_len"),
        ({"soft_cap": 30.0}, "has no soft cap"),
        ({"alibi": True}, "has no ALiBi slopes"),
        ({"bias": (1, 1)}, "a bias with -inf"),
        ({"dropout_rate": 0.1}, "drops other weights"),
        ({"causal": True, "q_offset": 1}, "needs q_offset 0"),
        ({"causal": True, "q_offset": None}, "needs q_offset 0"),
        ({"window": 5}, "has no window without a causal mask"),
        ({"causal": True, "window": 5, "kv_len": 31}, "has no window for more queries than keys"),
        ({"causal": True, "q_len": 1}, "has no causal mask for a single query"),
        ({"interpret": True}, "leave out interpret"),
    ],
)
def test_unsupported_calls_have_reasons(fields: Any, reason: str | None) -> None:
    answer = BACKEND.supports(replace(call_on_gpu(), **fields))
    assert (answer is None) if reason is None else (answer is not None and reason in answer)


def test_requested_by_name_raises_with_the_reason() -> None:
    x = np.zeros((1, 8, 2, 64), np.float32)
    with pytest.raises(ValueError, match="'cudnn' cannot serve this call: needs an NVIDIA GPU"):
        jax.eval_shape(partial(flash_attention, implementation="cudnn"), x, x, x)
