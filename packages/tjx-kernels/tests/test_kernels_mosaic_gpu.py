"""Hopper kernels: backend contract in JAX's interpreter, races, lowering."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from attention_contract import ARRAYS, CASES, AttentionContract, Case, assert_agrees, draw
from attention_oracle import oracle
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu

from tjx_kernels import flash_attention
from tjx_kernels.attention.backends.mosaic_gpu import backend, dq, forward, gradients
from tjx_kernels.attention.call import AttentionCall, describe_call


@pytest.fixture(autouse=True)
def _allow_transfers() -> Iterator[None]:
    """JAX's interpreter for these kernels moves arrays of its own, in threads of its own."""
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "allow")  # type: ignore[no-untyped-call]
    yield
    jax.config.update("jax_transfer_guard", before)  # type: ignore[no-untyped-call]


@pytest.mark.slow  # about five seconds a test, nearly all to compile what the interpreter runs
class TestMosaicGpu(AttentionContract):
    implementation = "mosaic_gpu"
    interpret = True
    head_dim = 16
    dtype = "bfloat16"
    tolerance = 2e-2
    draws = 3
    refuses = frozenset(
        {"alibi", "bias", "bias-for-all", "bias-of-heads", "dropout", "wide-values", "float64"}
    )


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Enable race detection in the interpreter and fail on reported races."""
    params = plgpu.InterpretGPUParams(detect_races=True)
    for module in (forward, dq, gradients):
        monkeypatch.setattr(module, "interpret_params", lambda _: params)
    yield
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.usefixtures("races")
@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        ("long-and-odd", 32, "float16"),
        ("causal-dead-rows", 80, "bfloat16"),
        ("window-two-sided", 96, "float16"),
        ("offset-of-each-row", 64, "bfloat16"),
        ("everything", 128, "bfloat16"),
        ("soft-cap-and-scale", 256, "float16"),
    ],
)
def test_forward_agrees_with_oracle(name: str, head_dim: int, dtype: str) -> None:
    case = CASES[name]
    inputs = draw(1, case, head_dim, dtype)
    arrays = {x: inputs[x] for x in ARRAYS if x in inputs}

    @jax.jit
    def run(q: Any, k: Any, v: Any, arrays: Any) -> Any:
        attend: Any = partial(flash_attention, implementation="mosaic_gpu", interpret=True)
        return attend(q, k, v, return_lse=True, **arrays, **case.options)

    out, lse = jax.device_get(run(*jax.device_put([*(inputs[x] for x in "qkv"), arrays])))
    wanted = oracle(inputs, **case.options)
    exact = {"bfloat16": 1e-2, "float16": 2e-3}[dtype]
    assert_agrees({"out": out}, {"out": wanted["out"]}, exact)
    # Softmax and LSE are float32: they do not err as the output does.
    assert_agrees({"lse": lse}, {"lse": wanted["lse"]}, 1e-5)


@pytest.mark.usefixtures("races")
def test_gradients_agree_with_oracle() -> None:
    options = {"causal": True, "window": 50, "soft_cap": 2.0, "q_offset": 30}
    case = Case((1, 90, 120, 2, 1), options, segments=2)
    TestMosaicGpu().check(draw(1, case, 32, "bfloat16"), **case.options)


def _case(**options: Any) -> AttentionCall:
    x = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)  # type: ignore[no-untyped-call]
    return describe_call(q=x, k=x, v=x, interpret=True, **options)


def test_only_hopper_is_supported() -> None:
    call = replace(_case(), interpret=False)
    assert "sm_90" in str(backend.supports(call))
    for architecture in ("sm_80", "sm_89", "sm_100", "sm_120"):
        call = replace(call, platform="gpu", architecture=architecture)
        assert "sm_90" in str(backend.supports(call))
    assert backend.supports(replace(call, architecture="sm_90")) is None


@pytest.mark.parametrize(
    ("installed", "refused"),
    [
        ({}, False),
        ({"nvidia-cuda-nvcc-cu12": "12.8.93"}, False),  # another package's: JAX's plugin is missing
        ({"jax-cuda12-plugin": "0.11.2", "nvidia-cuda-nvcc-cu12": "12.6.85"}, False),
        ({"jax-cuda12-plugin": "0.11.2", "nvidia-cuda-nvcc-cu12": "12.8.61"}, True),
        ({"jax-cuda12-plugin": "0.11.2", "nvidia-cuda-nvcc-cu12": "12.9.41"}, True),
        ({"jax-cuda12-plugin": "0.11.2", "nvidia-cuda-nvcc-cu12": "12.9.86"}, False),
    ],
)
def test_ptxas_versions_that_miscompile_are_unsupported(
    installed: dict[str, str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name in installed:
            return installed[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    backend._ptxas_miscompiles.cache_clear()
    call = replace(_case(), interpret=False, platform="gpu", architecture="sm_90")
    reason = backend.supports(call)
    backend._ptxas_miscompiles.cache_clear()
    assert ("ptxas" in str(reason)) == refused


HOPPER = jax.sharding.AbstractMesh(
    (1,), ("x",), abstract_device=jax.sharding.AbstractDevice("NVIDIA H200", None, "gpu")
)


def _lower(case: Case, head_dim: int, dtype: str) -> str:
    inputs = draw(0, case, head_dim, dtype)
    specs = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, inputs))

    def both(q: Any, k: Any, v: Any, arrays: Any) -> Any:
        attend: Any = partial(
            flash_attention, implementation="mosaic_gpu", return_lse=True, **case.options
        )
        results, pull = jax.vjp(lambda *x: attend(*x, **arrays), q, k, v)
        return pull(results)

    arrays = {x: specs[x] for x in ARRAYS if x in specs}
    operands = (*(specs[x] for x in "qkv"), arrays)
    with jax.sharding.use_abstract_mesh(HOPPER):
        return str(export.export(jax.jit(both), platforms=["cuda"])(*operands).mlir_module())


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        ("everything", 128, "float16"),
        ("segments", 256, "bfloat16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("causal", 64, "bfloat16"),
                ("plain", 80, "float16"),
                ("window-two-sided", 96, "bfloat16"),
                ("offset-of-each-row", 128, "bfloat16"),
                ("soft-cap-and-scale", 256, "bfloat16"),
            ]
        ),
    ],
)
def test_lowers_for_hopper(name: str, head_dim: int, dtype: str) -> None:
    """Layouts, shared memory and instructions fit: the blocks of the table for the GPU."""
    module = _lower(CASES[name], head_dim, dtype)
    assert module.count("mosaic_gpu") >= 2  # forward and backward
