"""The default on NVIDIA GPUs, under determinism too, and what is said of a choice."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tjx_kernels import flash_attention
from tjx_kernels.attention.api import BACKENDS, choose, implementations_for
from tjx_kernels.attention.arguments import Arguments
from tjx_kernels.attention.diagnosis import compile_failure, explain_choice, next_choice
from tjx_kernels.attention.registry import Choice, UnsupportedCallError, observe_choices
from tjx_kernels.attention.types import PLAIN, AttentionCall, Operands


def on_gpu(architecture: str = "sm_90", **fields: Any) -> AttentionCall:
    return replace(PLAIN, platform="gpu", architecture=architecture, **fields)


def default(call: AttentionCall) -> Choice:
    reasons = implementations_for(call)
    return Choice(choose(None, reasons), False, reasons, call)


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
def test_determinism_takes_cudnn_only_where_it_is_documented(
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
def test_determinism_is_what_xla_is_told(
    flags: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    x = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)  # type: ignore[no-untyped-call]
    assert Arguments(q=x, k=x, v=x).describe().deterministic is found


def test_a_choice_is_explained_by_what_came_before_it_on_this_device() -> None:
    assert explain_choice(default(on_gpu())) == "cudnn (the first that supports this call on sm_90)"
    said = explain_choice(default(on_gpu("sm_80", dropout_rate=0.1)))
    assert said.startswith("triton (the first that supports this call on sm_80; cudnn: drops")
    assert "mosaic_gpu" not in said
    assert "tpu" not in said
    by_name = default(on_gpu())._replace(by_name=True)
    assert explain_choice(by_name) == "cudnn (requested by name)"


def test_a_requested_implementation_that_does_not_support_the_call_has_its_own_error() -> None:
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
    return BACKENDS["xla"].run(call, operands._replace(q=identity(operands.q)))


def test_an_implementation_that_does_not_compile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only the backward pass is at fault."""
    entry = BACKENDS["xla"]._replace(run=broken)
    monkeypatch.setitem(BACKENDS, "broken", entry)
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
