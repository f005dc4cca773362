"""Sharded batch and heads: equivalence to one device, without communication."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tjx_kernels import flash_attention
from tjx_kernels.sharded.api import sharded_flash_attention

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
SPREAD: Any = {"batch_axes": "data", "head_axes": "tensor"}


def mesh_of(*sizes: int, axis_type: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh(sizes, ("data", "tensor"), axis_types=(axis_type,) * 2)


def sharding(mesh: Mesh, *axes: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes))  # type: ignore[no-untyped-call]


def draw(heads: int, kv_heads: int, **arrays: Any) -> tuple[dict[str, Any], tuple[Any, Any]]:
    """Operands of batch 4, with 24 queries, 30 keys and head_dim 8, and cotangents.

    `arrays` are the sizes of further operands along batch and heads.
    """
    rng = np.random.default_rng(0)

    def normal(*sizes: int) -> Any:
        return rng.standard_normal(sizes).astype(np.float32)

    operands = {"q": normal(4, 24, heads, 8)}
    operands |= {name: normal(4, 30, kv_heads, 8) for name in "kv"}
    if "bias" in arrays:
        operands["bias"] = normal(*arrays["bias"], 24, 30)
    if "alibi" in arrays:
        operands["alibi_slopes"] = np.abs(normal(*arrays["alibi"]))
    if "sinks" in arrays:
        operands["sinks"] = normal(heads)
    if "segments" in arrays:
        for name, length in (("q_segment_ids", 24), ("kv_segment_ids", 30)):
            operands[name] = np.sort(rng.integers(0, 3, (4, length)), 1).astype(np.int32)
    if "offsets" in arrays:
        operands["q_offset"] = rng.integers(0, 7, 4).astype(np.int32)
    if "dropout" in arrays:
        with jax.transfer_guard("allow"):
            operands["dropout_key"] = jax.random.key(1)
    return operands, (normal(4, 24, heads, 8), normal(4, heads, 24))


def results(function: Any, mesh: Mesh, operands: Any, cotangents: Any, **options: Any) -> Any:
    """Output, LSE, and the gradients of q, k, v, the bias and the sinks through both."""

    def run(operands: dict[str, Any], cotangents: Any) -> Any:
        names = ("q", "k", "v", "bias", "sinks")
        wanted = {name: operands[name] for name in names if name in operands}

        def of_floats(given: dict[str, Any]) -> Any:
            return function(**{**operands, **given}, return_lse=True, **options)

        (out, lse), pull = jax.vjp(of_floats, wanted)
        return {"out": out, "lse": lse, **pull(cotangents)[0]}

    given = jax.device_put((operands, cotangents), sharding(mesh))
    return jax.device_get(jax.jit(run)(*given))


@pytest.mark.parametrize(
    ("sizes", "heads", "kv_heads", "arrays", "options"),
    [
        ((4, 2), 4, 2, {"segments": True, "bias": (1, 1)}, {"causal": True, "window": 9}),
        (
            (2, 4),  # two places share a key head
            8,
            2,
            {"bias": (1, 8), "alibi": (8,), "segments": True, "offsets": True},
            {"causal": True, "soft_cap": 2.0},
        ),
        ((2, 2), 4, 1, {"bias": (4, 1), "alibi": (4, 4), "sinks": True}, {}),
        ((4, 1), 2, 1, {"dropout": True}, {"dropout_rate": 0.2}),
        ((2, 2), 4, 1, {}, {"mask": lambda *at: (at[3] <= at[2]) | (at[3] < 3)}),
    ],
)
def test_equals_the_call_on_one_device(
    sizes: Any, heads: int, kv_heads: int, arrays: Any, options: Any
) -> None:
    operands, cotangents = draw(heads, kv_heads, **arrays)
    options = {**options, "implementation": "reference"}
    mesh = mesh_of(*sizes)
    function = partial(sharded_flash_attention, mesh=mesh, **SPREAD)
    found = results(function, mesh, operands, cotangents, **options)
    wanted = results(flash_attention, mesh_of(1, 1), operands, cotangents, **options)
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-5, err_msg=name)


def test_several_axes_and_none() -> None:
    operands, _ = draw(3, 3, dropout=True)
    mesh = mesh_of(2, 2)
    options: Any = {"dropout_rate": 0.2, "implementation": "reference"}
    wanted = jax.jit(partial(flash_attention, **options))(**jax.device_put(operands))
    given = jax.device_put(operands, sharding(mesh))
    for axes in (("data", "tensor"), "data", ()):
        function = partial(sharded_flash_attention, mesh=mesh, batch_axes=axes, **options)
        key = jax.random.clone(given["dropout_key"])  # type: ignore[no-untyped-call]
        found = jax.device_get(jax.jit(function)(**{**given, "dropout_key": key}))
        np.testing.assert_allclose(found, jax.device_get(wanted), rtol=0, atol=1e-5)


def lowered(mesh: Mesh, kv_heads: int, kv_axis: str | None, dtype: Any = np.float32) -> Any:
    """The lowered gradient, for operands that are where they belong."""

    def shape(heads: int, axis: str | None) -> Any:
        where = sharding(mesh, "data", None, axis)
        return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
            (8, 32, heads, 8), dtype, sharding=where
        )

    def gradient(q: Any, k: Any, v: Any) -> Any:
        run = partial(sharded_flash_attention, mesh=mesh, causal=True, **SPREAD)
        out, pull = jax.vjp(run, q, k, v)
        return pull(out)

    kv = shape(kv_heads, kv_axis)
    return jax.jit(gradient).lower(shape(8, "tensor"), kv, kv)


def test_nothing_is_communicated() -> None:
    text = lowered(mesh_of(2, 4), 4, "tensor").compile().as_text()
    assert not [name for name in COLLECTIVES if name in text]


def test_gradients_of_shared_key_heads_are_summed_in_float32_and_no_more() -> None:
    program = lowered(mesh_of(2, 4), 2, None, jnp.bfloat16)
    text = program.compile().as_text()
    assert [name for name in COLLECTIVES if name in text] == ["all-reduce"]
    # (Compiled for the CPU, sums of bfloat16 would be float32 in any case.)
    sums = re.findall(r"stablehlo.all_reduce.*?\}\) : \((.*?)\)", program.as_text(), re.DOTALL)
    assert sums == ["tensor<4x32x2x8xf32>"] * 2  # of k and of v


def test_axes_whose_sharding_is_part_of_the_type() -> None:
    mesh = mesh_of(4, 2, axis_type=AxisType.Explicit)
    operands, _ = draw(4, 2)
    spread = jax.device_put(operands, sharding(mesh, "data", None, "tensor"))
    with jax.set_mesh(mesh):
        run = jax.jit(partial(sharded_flash_attention, mesh=mesh, causal=True, **SPREAD))
        found = run(**spread)
    assert found.sharding.spec[:3] == ("data", None, "tensor")
    wanted = jax.jit(partial(flash_attention, causal=True))(**jax.device_put(operands))
    np.testing.assert_allclose(jax.device_get(found), jax.device_get(wanted), rtol=0, atol=1e-5)


def test_an_empty_sequence_gives_dead_rows() -> None:
    operands, _ = draw(4, 4)
    given = jax.device_put({name: x[:, :0] for name, x in operands.items()})
    run = partial(sharded_flash_attention, mesh=mesh_of(2, 2), return_lse=True, **SPREAD)
    out, lse = jax.jit(run)(**given)
    assert out.shape == (4, 0, 4, 8)
    assert lse.shape == (4, 4, 0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "spread", "message"),
    [
        (4, 4, {"batch_axes": "rows"}, r"batch_axes: got 'rows'; .*'data', 'tensor'"),
        (4, 4, {"head_axes": ("tensor", "data"), "batch_axes": "data"}, "'data' 2 times"),
        (6, 3, {"head_axes": "tensor"}, "heads: got 6; .* 4 devices along tensor"),
        (12, 6, {"head_axes": "tensor"}, "kv_heads: got 6 with 4 devices"),
        (4, 4, {"batch_axes": ("data", "tensor")}, "batch: got 4; .* 8 devices"),
        (
            4,
            4,
            {"head_axes": "tensor", "mask": lambda *at: at[1] < 2},
            "mask: .* head index, which",
        ),
        (
            4,
            4,
            {"seq_axes": "data", "mask": lambda *at: at[3] < 2},
            '"ring", which has no mask func',
        ),
        (4, 4, {"implementation": "cudnn"}, "'cudnn' cannot serve this call: needs an NVIDIA GPU"),
    ],
)
def test_invalid_arguments_raise(heads: int, kv_heads: int, spread: Any, message: str) -> None:
    operands, _ = draw(heads, kv_heads)
    run = partial(sharded_flash_attention, mesh=mesh_of(2, 4), **spread)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, **operands)
