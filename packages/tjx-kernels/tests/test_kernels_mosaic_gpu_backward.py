"""Hopper backward kernels: small blocks against the oracle, races, lowering."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import ARRAYS, Case, assert_agrees, draw
from attention_oracle import oracle
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu

from tjx_kernels.attention.backend import BackwardInputs, backward_inputs
from tjx_kernels.attention.backends.mosaic_gpu import backward, dq, dq_sum, gradients
from tjx_kernels.attention.block_sizes import BlockSizes
from tjx_kernels.attention.call import AttentionCall, bind_arguments


@pytest.fixture(autouse=True)
def _allow_transfers() -> Iterator[None]:
    """JAX's interpreter for these kernels moves arrays of its own, in threads of its own."""
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "allow")  # type: ignore[no-untyped-call]
    yield
    jax.config.update("jax_transfer_guard", before)  # type: ignore[no-untyped-call]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small blocks, so that few rows reuse every stage many times."""
    monkeypatch.setattr(backward, "block_sizes", lambda _: BlockSizes(16, 16, 2, 2))


def _gradients(inputs: dict[str, Any], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the kernels on the oracle's output and LSE; give theirs and the oracle's gradients."""
    arrays = {x: inputs[x] for x in ("q", "k", "v", *ARRAYS) if x in inputs}
    call, operands = bind_arguments(**jax.device_put(arrays), **options, interpret=True)
    wanted = oracle(inputs, **options)
    rows = backward_inputs(
        call,
        jnp.asarray(wanted["out"], call.dtype),
        jnp.asarray(wanted["lse"], jnp.float32),
        *jax.device_put((inputs["dout"], inputs["dlse"])),
    )
    found = backward.backward(call, operands, rows)
    names = ("dq", "dk", "dv")
    ours = {name: np.asarray(x) for name, x in zip(names, found[:3], strict=True)}
    return ours, {name: wanted[name] for name in names}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case((1, 70, 70, 2, 1), {"causal": True}), marks=pytest.mark.slow),
        Case((1, 64, 72, 2, 1), {"causal": True, "window": 20, "q_offset": 3}),
        Case((2, 40, 50, 1, 1), {"window": 9, "soft_cap": 2.0}, segments=3, offset=(-5, 12)),
        Case((1, 1, 1, 2, 1), {"scale": -0.3}),
    ],
    ids=["group", "window", "segments-and-offsets", "one"],
)
def test_agrees_with_oracle_without_races(
    case: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    params = plgpu.InterpretGPUParams(detect_races=True)
    for module in (dq, gradients):
        monkeypatch.setattr(module, "interpret_params", lambda _: params)
    found, wanted = _gradients(draw(1, case, 16, "float16"), **case.options)
    assert_agrees(found, wanted, 2e-3)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("limit", ["FUSED_HEAD_DIM", "TOGETHER_HEAD_DIM"])
def test_gradients_are_the_same_together_and_apart(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger head_dim has more kernels, from the same source but for dq."""
    inputs = draw(2, Case((1, 40, 40, 1, 1)), 16, "float16")
    together, _ = _gradients(inputs, causal=True)
    monkeypatch.setattr(backward, "FUSED_HEAD_DIM", 0)
    monkeypatch.setattr(backward, limit, 0)
    apart, _ = _gradients(inputs, causal=True)
    # Float32 sums in another order may round to another float16.
    np.testing.assert_allclose(together.pop("dq"), apart.pop("dq"), rtol=2e-3, atol=1e-4)
    for name, x in together.items():
        np.testing.assert_array_equal(x, apart[name])


def _call(head_dim: int, **changes: Any) -> AttentionCall:
    known: dict[str, Any] = {
        "batch": 2,
        "q_len": 1003,
        "kv_len": 777,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": head_dim,
        "v_head_dim": head_dim,
        "dtype": "bfloat16",
        "causal": True,
        "window": None,
        "soft_cap": None,
        "scale": head_dim**-0.5,
        "dropout_rate": 0.0,
        "segment_ids": False,
        "alibi": False,
        "bias": None,
        "q_offset": 0,
        "return_lse": True,
        "platform": "gpu",
        "architecture": "sm_90",
        "interpret": False,
    }
    return AttentionCall(**{**known, **changes})


@pytest.mark.parametrize(
    ("head_dim", "changes"),
    [
        (16, {"causal": False}),
        (64, {}),
        (64, {"deterministic": True, "window": 100, "segment_ids": True, "q_offset": None}),
        pytest.param(80, {"window": 100}, marks=pytest.mark.slow),
        pytest.param(96, {"soft_cap": 30.0, "dtype": "float16"}, marks=pytest.mark.slow),
        # `test_kernels_mosaic_gpu.py` lowers the backward pass of these too.
        *(
            pytest.param(head_dim, changes, marks=pytest.mark.slow)
            for head_dim, changes in [
                (128, {"window": 100, "segment_ids": True, "q_offset": None}),
                (256, {"window": 100, "segment_ids": True, "q_offset": None, "soft_cap": 30.0}),
            ]
        ),
    ],
)
def test_lowers_for_hopper(head_dim: int, changes: dict[str, Any]) -> None:
    """The blocks of the table fit in shared memory, and layouts fit the instructions."""
    call = _call(head_dim, **changes)

    def run(q: Any, k: Any, lse: Any, ids: Any, offset: Any) -> Any:
        options: Any = {"q_segment_ids": ids[0], "kv_segment_ids": ids[1]}
        if offset is not None:
            options["q_offset"] = offset
        operands = bind_arguments(q=q, k=k, v=k, **options)[1]
        return backward.backward(call, operands, BackwardInputs(q, lse, lse))[:3]

    def spec(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]  # jax's

    q = spec(call.dtype, call.batch, call.q_len, call.heads, head_dim)
    k = spec(call.dtype, call.batch, call.kv_len, call.kv_heads, head_dim)
    lse = spec(jnp.float32, call.batch, call.heads, call.q_len)
    ids = [spec(jnp.int32, *x.shape[:2]) if call.segment_ids else None for x in (q, k)]
    offset = spec(jnp.int32, call.batch) if call.q_offset is None else None
    program = export.export(jax.jit(run), platforms=["cuda"])(q, k, lse, ids, offset)
    assert [x.shape for x in program.out_avals] == [q.shape, k.shape, k.shape]


def test_turns_count_the_earlier_visitors_of_a_step() -> None:
    """Segments that are not in order: the visitors of a step are not consecutive."""
    ranges = np.array([[[0, 4], [2, 3], [0, 4]], [[3, 4], [0, 0], [0, 2]]], np.int32)
    call = _call(64, q_len=1000, kv_len=700, causal=False, segment_ids=True)
    found = dq_sum.turns(
        call, (jnp.array(ranges[..., 0]), jnp.array(ranges[..., 1])), None, 256, 256
    )
    for row, of_row in zip(np.asarray(found), ranges, strict=True):
        seen = [0] * 4
        for program, (start, stop) in enumerate(of_row):
            for step in range(start, stop):
                assert row[program, step] == seen[step]
                seen[step] += 1
