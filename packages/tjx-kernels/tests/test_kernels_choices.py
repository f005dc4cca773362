"""Backend selection: defaults on NVIDIA GPUs, determinism, diagnosis, registered backends."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_kernels import AttentionBackend, backends, flash_attention
from tjx_kernels.attention.api import UnsupportedCallError, choose_backend
from tjx_kernels.attention.backends import xla
from tjx_kernels.attention.call import AttentionCall, Operands, describe_call
from tjx_kernels.attention.choices import Choice, observe_choices
from tjx_kernels.attention.diagnosis import compile_failure, explain_choice, next_choice
from tjx_kernels.attention.registry import (
    implementations_for,
    register_backend,
    unregister_backend,
)
from tjx_kernels.attention.support_table import PLAIN


def on_gpu(architecture: str = "sm_90", **fields: Any) -> AttentionCall:
    return replace(PLAIN, platform="gpu", architecture=architecture, **fields)


def default(call: AttentionCall) -> Choice:
    return Choice(choose_backend(None, call), False, implementations_for(call), call)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_cudnn_then_triton_then_mosaic_then_xla_on_nvidia_gpus(architecture: str) -> None:
    choice, order = default(on_gpu(architecture)), []
    while choice.name not in order:
        order.append(choice.name)
        choice = choice._replace(name=next_choice(choice) or "")
    hopper = ["mosaic_gpu"] if architecture == "sm_90" else []
    assert order == ["cudnn", "triton", *hopper, "xla", "reference"]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (on_gpu("sm_80"), "cudnn"),
        (on_gpu("sm_90"), "cudnn"),
        (on_gpu("sm_100"), "triton"),
        (on_gpu("sm_90", head_dim=256, v_head_dim=256), "triton"),
    ],
)
def test_deterministic_flag_selects_cudnn_only_where_documented(
    call: AttentionCall, name: str
) -> None:
    assert default(call).name == "cudnn"
    assert default(replace(call, deterministic=True)).name == name


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("", False),
        ("--xla_gpu_autotune_level=0", False),
        ("--a=1 --xla_gpu_deterministic_ops=true", True),
        ("--xla_gpu_exclude_nondeterministic_ops", True),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", False),
    ],
)
def test_deterministic_follows_xla_flags(
    flags: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    x = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)  # type: ignore[no-untyped-call]
    assert describe_call(q=x, k=x, v=x).deterministic is found


def test_explanation_lists_skipped_backends_of_the_device() -> None:
    assert explain_choice(default(on_gpu())) == "cudnn (the first that supports this call on sm_90)"
    said = explain_choice(default(on_gpu("sm_80", dropout_rate=0.1)))
    assert said.startswith("triton (the first that supports this call on sm_80; cudnn: drops")
    assert "mosaic_gpu" not in said
    assert "tpu" not in said
    by_name = default(on_gpu())._replace(by_name=True)
    assert explain_choice(by_name) == "cudnn (requested by name)"


def test_unsupported_requested_backend_raises() -> None:
    x: Any = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedCallError, match="needs an NVIDIA GPU"):
        jax.eval_shape(partial(flash_attention, implementation="triton"), x, x, x)


def broken(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Compute attention; no compiler knows the function that the backward pass calls."""

    @jax.custom_vjp
    def identity(q: Any) -> Any:
        return q

    def backward(_: None, dq: jax.Array) -> tuple[jax.Array]:
        called: jax.Array = jax.ffi.ffi_call("no_such_kernel", dq)(dq)
        return (called,)

    identity.defvjp(lambda q: (q, None), backward)
    return xla.BACKEND.run(call, operands._replace(q=identity(operands.q)))


def test_compile_failure_is_detected(
    request: pytest.FixtureRequest,
) -> None:
    """Also where only the backward pass is at fault."""
    register_backend("broken", xla.BACKEND._replace(run=broken))
    request.addfinalizer(partial(unregister_backend, "broken"))
    x: Any = jax.ShapeDtypeStruct((1, 8, 2, 4), jnp.float32)  # type: ignore[no-untyped-call]
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)  # type: ignore[no-untyped-call]
    slopes = jax.ShapeDtypeStruct((2,), jnp.float32)  # type: ignore[no-untyped-call]
    offset = jax.ShapeDtypeStruct((), jnp.int32)  # type: ignore[no-untyped-call]
    bias = jax.ShapeDtypeStruct((1, 1, 8, 8), jnp.float32)  # type: ignore[no-untyped-call]
    choices: list[Choice] = []
    with observe_choices(choices.append):
        for name in ("broken", "xla"):
            run = partial(flash_attention, implementation=name, causal=True)
            jax.eval_shape(
                lambda x, ids, slopes, offset, bias, run=run: run(
                    x, x, x, q_segment_ids=ids, kv_segment_ids=ids, alibi_slopes=slopes,
                    q_offset=offset, bias=bias, dropout_rate=0.5, dropout_key=jax.random.key(0),
                ),
                x, ids, slopes, offset, bias,
            )  # fmt: skip
    assert [choice.name for choice in choices] == ["broken", "xla"]
    assert "no_such_kernel" in str(compile_failure(choices[0]))
    assert compile_failure(choices[1]) is None


def doubled(call: AttentionCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Compute attention of doubled values, so that its use is visible in the output."""
    return xla.BACKEND.run(call, operands._replace(v=operands.v + operands.v))


def only_float32(call: AttentionCall) -> str | None:
    return None if call.dtype == "float32" else "computes in float32 alone"


def test_a_registered_backend_runs_by_name_and_automatically() -> None:
    x = np.random.default_rng(0).standard_normal((1, 8, 2, 4), np.float32)
    full, half = jax.device_put((x, x.astype(jnp.bfloat16)))
    plain = np.asarray(flash_attention(full, full, full, causal=True))
    entry = AttentionBackend(run=doubled, supports=only_float32)
    try:
        register_backend("mine", entry)
        assert choose_backend(None, replace(PLAIN, dtype="float32")) == "xla"
        by_name = flash_attention(full, full, full, causal=True, implementation="mine")
        np.testing.assert_array_equal(by_name, 2 * plain)
        with pytest.raises(UnsupportedCallError, match="computes in float32 alone"):
            flash_attention(half, half, half, implementation="mine")
        unregister_backend("mine")
        register_backend("mine", entry, before="cudnn")
        assert next(iter(backends())) == "mine"
        np.testing.assert_array_equal(flash_attention(full, full, full, causal=True), 2 * plain)
        assert choose_backend(None, PLAIN) == "xla"  # bfloat16
    finally:
        unregister_backend("mine")


def test_the_registry_rejects_bad_names() -> None:
    entry = AttentionBackend(run=doubled)
    with pytest.raises(ValueError, match="name: got 'xla'; expected a new name"):
        register_backend("xla", entry)
    with pytest.raises(ValueError, match="before: got 'cuda'"):
        register_backend("mine", entry, before="cuda")
    for name in ("xla", "unknown"):
        with pytest.raises(ValueError, match="expected a backend added by register_backend"):
            unregister_backend(name)
    assert "mine" not in backends()


def test_backends_of_other_platforms_are_skipped(request: pytest.FixtureRequest) -> None:
    def supports(call: AttentionCall) -> str | None:
        raise AssertionError(call)

    entry = AttentionBackend(run=doubled, supports=supports, platforms=("tpu",))
    register_backend("mine", entry, before="cudnn")
    request.addfinalizer(partial(unregister_backend, "mine"))
    assert choose_backend(None, PLAIN) == "xla"
