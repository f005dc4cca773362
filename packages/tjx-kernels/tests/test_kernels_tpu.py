"""The TPU kernels: the contract in Pallas' interpreter, and what only they do.

The plain interpreter (`interpret=True`) serves the contract: it compiles the grid to one loop. The
TPU simulator, which starts from NaN in all scratch memory, is far slower and runs once.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import (
    CASES,
    LOWERED,
    AttentionContract,
    Case,
    assert_agrees,
    draw,
    islands,
)
from attention_oracle import oracle
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from tjx_kernels import flash_attention
from tjx_kernels.attention.backend import BackwardInputs, Gradients
from tjx_kernels.attention.backends.tpu.backend import BACKEND
from tjx_kernels.attention.block_sizes import TABLE
from tjx_kernels.attention.call import bind_arguments, describe_call

KINDS = ("TPU v5 lite", "TPU v6 lite")


class TestTpu(AttentionContract):
    implementation = "tpu"
    interpret = True
    refuses = frozenset({"float64"})
    draws = 5


def test_scratch_memory_is_never_read_before_it_is_written() -> None:
    """The simulator fills memory with NaN; fully masked blocks are never written."""
    case = Case((1, 40, 70, 2, 1), {"causal": True, "q_offset": 25, "window": 40}, segments=2)
    inputs = draw(20, case, 8)
    simulator = pltpu.InterpretParams(uninitialized_memory="nan")
    # The simulator itself moves data between host and device.
    with jax.transfer_guard("allow"), pltpu.force_tpu_interpret_mode(simulator):
        found = TestTpu().compute(inputs, **case.options)
    assert_agrees(found, oracle(inputs, **case.options), 1e-5)


def test_fully_masked_blocks_are_skipped() -> None:
    """NaN values in them must not reach the result: a mask alone gives 0 * NaN."""
    inputs = draw(21, Case((1, 300, 300, 2, 1)), 8)
    ids = np.repeat(np.arange(2, dtype=np.int32), (150, 150))[None]
    wanted = oracle({**inputs, "q_segment_ids": ids, "kv_segment_ids": ids})
    hidden = {"q_segment_ids": ids[:, :128] * 0, "kv_segment_ids": ids}
    few = {n: inputs[n][:, :128] for n in ("q", "dout")} | {"dlse": inputs["dlse"][:, :, :128]}
    for name in ("k", "v"):
        few[name] = np.where((np.arange(300) >= 192)[None, :, None, None], np.nan, inputs[name])
    by_segment = TestTpu().compute({**few, **hidden})
    np.testing.assert_allclose(by_segment["out"], wanted["out"][:, :128], atol=1e-5)
    causal = TestTpu().compute(few, causal=True)
    assert np.all(np.isfinite(causal["out"]))
    assert np.all(causal["dk"][:, 128:] == 0)


def test_rows_past_the_end_add_nothing() -> None:
    """Falling slopes give them scores of which the exponential overflows."""
    inputs = draw(22, Case((1, 37, 45, 4, 2), alibi=True), 8)
    inputs["alibi_slopes"] *= -8
    assert_agrees(TestTpu().compute(inputs), oracle(inputs), 1e-5)


def test_vmapped_mask_functions_get_the_index_in_their_own_batch() -> None:
    x = jax.device_put(
        np.random.default_rng(0).standard_normal((3, 2, 40, 2, 8)).astype(np.float32)
    )

    def attend(implementation: str, interpret: bool, x: jax.Array) -> jax.Array:
        return flash_attention(
            x, x, x, mask=islands, implementation=implementation, interpret=interpret
        )

    def squares(implementation: str, interpret: bool, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(partial(attend, implementation, interpret))(x) ** 2)

    found = jax.jit(jax.value_and_grad(partial(squares, "tpu", True)))(x)
    wanted = jax.jit(jax.value_and_grad(partial(squares, "reference", False)))(x)
    for a, b in zip(jax.device_get(found), jax.device_get(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def _lower(kind: str, case: Case, head_dim: int, dtype: str) -> str:
    """Lower both passes for a kind of TPU, with the blocks that run there."""
    inputs = draw(0, case, head_dim, dtype)
    outputs = [inputs.pop(name) for name in ("dout", "dlse")]
    options = dict(case.options)
    shapes = jax.eval_shape(lambda x: x, inputs)
    if "dropout_rate" in options:
        shapes["dropout_key"] = jax.eval_shape(lambda: jax.random.key(0))
    options["return_lse"] = True
    call = replace(describe_call(**shapes, **options), platform="tpu", architecture=kind)
    assert BACKEND.supports(call) is None

    def both(x: dict[str, Any], dout: Any, dlse: Any) -> tuple[Any, Gradients]:
        assert BACKEND.backward is not None
        _, operands = bind_arguments(**x, **options)
        rows = BackwardInputs(dout, dlse, dlse)
        return BACKEND.run(call, operands), BACKEND.backward(call, operands, rows)

    specs = jax.eval_shape(lambda *x: x, *outputs)
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        exported = jax.export.export(jax.jit(both), platforms=["tpu"])(shapes, *specs)
    return str(exported.mlir_module())


@pytest.mark.parametrize(("head_dim", "dtype"), LOWERED)
def test_lowers_for_tpu(head_dim: int, dtype: str) -> None:
    kind = KINDS[0] if dtype == "float32" else KINDS[1]
    case = Case((1, 1200, 1100, 4, 2), {"causal": True})
    assert _lower(kind, case, head_dim, dtype).count("tpu_custom_call") == 3


def test_float16_lowers_for_tpu() -> None:
    assert "tpu_custom_call" in _lower(KINDS[0], Case((1, 300, 300, 2, 1)), 64, "float16")


@pytest.mark.parametrize(
    "name", ["everything", "alibi", "bias-for-all", "dropout", "segments", "mask-function"]
)
def test_every_feature_lowers_for_tpu(name: str) -> None:
    case = CASES[name]
    longer = replace(case, shape=(2, 700, 1500, *case.shape[3:]), offset=(-40, 60))
    options = {k: v for k, v in case.options.items() if k != "q_offset"}
    lowered = _lower(KINDS[0], replace(longer, options=options), 64, "bfloat16")
    # A bias has a gradient of its own.
    assert lowered.count("tpu_custom_call") == 3 + ("bias" in name)


@pytest.mark.parametrize(
    ("q_len", "kv_len"),
    [
        (1, 1000), (130, 7),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(1, 1), (1000, 1)]),
    ],
)  # fmt: skip
def test_any_length_lowers_for_tpu(q_len: int, kv_len: int) -> None:
    lowered = _lower(KINDS[1], Case((2, q_len, kv_len, 4, 1), segments=3), 128, "bfloat16")
    assert lowered.count("tpu_custom_call") == 3


def test_table_has_every_device_kind() -> None:
    for kernel in ("tpu", "tpu-float32"):
        rows = [row for row in TABLE if row.kernel == kernel]
        assert {row.architecture for row in rows if row.head_dim == 256} == {"interpret", *KINDS}
        assert {row.head_dim for row in rows} == {128, 256}
        for sizes in (TABLE[row] for row in rows if row.architecture in KINDS):
            assert sizes.q % 128 == 0, sizes
            assert sizes.k % 128 == 0, sizes


def test_unsupported_calls_have_a_reason() -> None:
    x: Any = jax.eval_shape(lambda: jnp.zeros((1, 8, 1, 64)))
    call = describe_call(q=x, k=x, v=x)
    for change, reason in (
        ({}, "needs a TPU"),
        ({"platform": "tpu", "dtype": "float64"}, "float64"),
        ({"platform": "tpu", "v_head_dim": 512}, "head_dim"),
    ):
        assert reason in str(BACKEND.supports(replace(call, **change)))
