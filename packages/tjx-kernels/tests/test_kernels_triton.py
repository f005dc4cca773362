"""Triton kernels: backend contract in Pallas' interpreter, lowering for GPUs."""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import CASES, LOWERED, AttentionContract, assert_agrees, islands
from attention_oracle import oracle
from jax.experimental.pallas import triton as plt
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from tjx_kernels import flash_attention
from tjx_kernels.attention.block_sizes import TABLE


class TestTriton(AttentionContract):
    implementation = "triton"
    interpret = True
    draws: ClassVar[int] = 5
    refuses = frozenset({"float64"})

    def test_rows_past_the_end_have_no_weight(self) -> None:
        """Slopes so negative that the weights of rows past the end would overflow."""
        case = CASES["alibi"]
        inputs = self.draw(20, case)
        inputs["alibi_slopes"] = np.full(4, -10, np.float32)
        found = self.compute(inputs, **case.options)
        # Scores of hundreds leave float32 fewer digits than the contract asks for.
        wanted = oracle(inputs, **case.options)
        assert_agrees(found, wanted, 10 * self.tolerance)


# --- lowering -------------------------------------------------------------------------------------

SHAPED: Any = jax.ShapeDtypeStruct  # which has no types, as PartitionSpec
PARTITIONED: Any = PartitionSpec
PLAIN: dict[str, Any] = {"causal": True}
FEATURES: dict[str, dict[str, Any]] = {
    "window": {"causal": True, "window": 100},
    "soft cap": {"soft_cap": 20.0, "q_offset": 7},
    "offset": {"causal": True, "q_offset": SHAPED((2,), jnp.int32)},
    "segments": {
        "causal": True,
        "q_segment_ids": SHAPED((2, 300), jnp.int32),
        "kv_segment_ids": SHAPED((2, 300), jnp.int32),
    },
    "bias": {"bias": SHAPED((1, 4, 300, 300), jnp.bfloat16)},
    "mask function": {"mask": islands},
    "alibi": {"causal": True, "alibi_slopes": SHAPED((4,), jnp.float32)},
    "dropout": {
        "dropout_rate": 0.1,
        "dropout_key": jax.eval_shape(partial(jax.random.key, 0)),
    },
}


def lower(kind: str, head_dim: int, dtype: str, options: dict[str, Any]) -> str:
    """Lower the forward and the backward pass for a GPU of this kind; give the StableHLO."""
    q = SHAPED((2, 300, 4, head_dim), dtype)
    kv = SHAPED((2, 300, 2, head_dim), dtype)
    arrays = {name: x for name, x in options.items() if isinstance(x, SHAPED)}
    static = {name: x for name, x in options.items() if name not in arrays}
    bias = arrays.pop("bias", None)

    def both(q: Any, k: Any, v: Any, bias: Any, arrays: Any) -> Any:
        attend: Any = partial(flash_attention, implementation="triton", **arrays, **static)
        out, pull = jax.vjp(lambda q, k, v, bias: attend(q, k, v, bias=bias), q, k, v, bias)
        return out, pull(out)

    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(plt.CUSTOM_CALL_TARGET_NAME)]
    with jax.sharding.use_abstract_mesh(mesh):
        export = jax.export.export(jax.jit(both), platforms=["cuda"], disabled_checks=allowed)
        return str(export(q, kv, kv, bias, arrays).mlir_module())


lowers = pytest.mark.filterwarnings(
    # That JAX will remove Pallas-Triton is known: the reason why it is a file by itself.
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


@lowers
@pytest.mark.parametrize(("head_dim", "dtype"), LOWERED)
def test_lowers_for_every_head_dim(head_dim: int, dtype: str) -> None:
    for kind in ("NVIDIA A100", "NVIDIA H100"):
        text = lower(kind, head_dim, dtype, PLAIN)
        for kernel in ("forward", "dq", "dkv"):
            assert f"triton_attention_{kernel}" in text


@lowers
@pytest.mark.parametrize("name", FEATURES)
def test_lowers_with_every_feature(name: str) -> None:
    text = lower("NVIDIA H100", 64, "float16", FEATURES[name])
    assert ("triton_attention_dbias" in text) == (name == "bias")


@lowers
def test_old_gpus_are_unsupported() -> None:
    with pytest.raises(ValueError, match="needs an NVIDIA GPU of sm_80 or later"):
        lower("Tesla T4", 64, "bfloat16", PLAIN)


def test_too_large_head_dims_are_unsupported() -> None:
    q = SHAPED((1, 8, 2, 257), jnp.float32)
    attend = partial(flash_attention, implementation="triton", interpret=True)
    with pytest.raises(ValueError, match="head_dim of at most 256"):
        jax.eval_shape(attend, q, q, q)


# --- what a table of blocks must hold -------------------------------------------------------------


def test_block_sizes_are_powers_of_two_from_16_on() -> None:
    rows = {row: sizes for row, sizes in TABLE.items() if row.kernel.startswith("triton")}
    assert len(rows) == 2 * 2 * 4 * (2 * 3 + 1)  # dtypes, causal, passes; GPUs and head_dims
    assert len({row._replace(head_dim=0) for row in rows}) == 2 * 2 * 4 * 3
    assert {row.head_dim for row in rows} == {64, 128, 256}
    for sizes in rows.values():
        assert all(x >= 16 and x & (x - 1) == 0 for x in (sizes.q, sizes.k))
        assert sizes.warps in (4, 8)


def test_results_vary_over_the_mesh_as_the_arrays_do() -> None:
    """Check the varying mesh axes by tracing: the interpreter itself fails shard_map's check."""
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = AbstractMesh((2,), ("data",), axis_types=auto, abstract_device=device)
    attend: Any = partial(flash_attention, causal=True, implementation="triton")

    def both(q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(out)

    spread = PARTITIONED("data")
    q = SHAPED((4, 40, 2, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        sharded = jax.shard_map(both, in_specs=spread, out_specs=spread)
        assert [x.shape for x in jax.eval_shape(sharded, q, q, q)] == [q.shape] * 4
