"""Collectives of a compiled program: kind, payload, axes, runs, bytes sent."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tjx_parallel.planning.collectives import Collective, collectives

P: Any = PartitionSpec  # JAX declares it without types
SHAPE = {"data": 2, "fsdp": 2, "tensor": 2}
F32, BF16 = 4, 2


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((2, 2, 2), tuple(SHAPE), axis_types=(AxisType.Auto,) * 3)


def found(
    function: Callable[..., Any], mesh: Mesh, *specs: Any, out: Any, dtype: Any = np.float32
) -> list[Collective]:
    """Compile a function of arrays [16, 32] for the mesh, and read its exchanges."""
    abstract: Any = jax.ShapeDtypeStruct
    given = [abstract((16, 32), dtype, sharding=NamedSharding(mesh, spec)) for spec in specs]
    out_shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out)
    lowered = jax.jit(function, out_shardings=out_shardings).lower(*given)
    hlo = lowered.compile().as_text()
    assert hlo is not None
    return collectives(hlo, dict(mesh.shape))


def test_bytes_axes_and_runs_of_explicit_collectives(mesh: Mesh) -> None:
    def exchange(x: jax.Array) -> tuple[jax.Array, ...]:  # a device has [8, 16]
        lax: Any = jax.lax
        summed = lax.psum(x[:4], "tensor")
        gathered = lax.all_gather(x[:2], ("data", "fsdp"), tiled=True)
        scattered = lax.psum_scatter(x, "fsdp", tiled=True)
        swapped = lax.all_to_all(x[:6], "data", split_axis=0, concat_axis=1, tiled=True)
        ring = [(0, 1), (1, 0)]
        passed, _ = lax.scan(
            lambda x, _: (lax.ppermute(jnp.sin(x), "fsdp", ring), None), x[:5], length=7
        )
        return summed, gathered, scattered, swapped, passed

    everywhere = P(None)
    local = jax.shard_map(
        exchange, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=(everywhere,) * 5,
        check_vma=False,
    )  # fmt: skip
    exchanges = found(local, mesh, P(("data", "fsdp")), out=(everywhere,) * 5)
    row = 32 * F32  # a device has 4 rows
    assert {(x.kind, x.axes): (x.payload, x.runs, x.wire_bytes) for x in exchanges} == {
        ("all-reduce", ("tensor",)): (4 * row, 1, 4 * row),  # 2 (n - 1) / n = 1
        ("all-gather", ("data", "fsdp")): (8 * row, 1, 6 * row),  # 3 / 4 of the whole
        ("reduce-scatter", ("fsdp",)): (4 * row, 1, 2 * row),
        ("all-to-all", ("data",)): (4 * row, 1, 2 * row),
        ("collective-permute", ("fsdp",)): (4 * row, 7, 7 * 4 * row),
    }


def test_a_sliced_all_reduce_counts_as_reduce_scatter(mesh: Mesh) -> None:
    def products(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x.T @ y, x.T @ (2 * y[:, :8])  # summed over rows, of which each device has some

    rows = P(("data", "fsdp"))
    exchanges = found(products, mesh, rows, rows, out=(rows, P()))
    assert {(x.kind, x.axes): (x.payload, x.wire_bytes) for x in exchanges} == {
        ("reduce-scatter", ("data", "fsdp")): (32 * 32 * F32, 32 * 32 * F32 * 3 / 4),
        ("all-reduce", ("data", "fsdp")): (32 * 8 * F32, 32 * 8 * F32 * 3 / 2),
    }


def test_numbers_of_16_bits_are_sent_as_such(mesh: Mesh) -> None:
    rows = P(("data", "tensor"))
    (only,) = found(lambda x: x.T @ x, mesh, rows, out=P(), dtype=jnp.bfloat16)
    assert (only.kind, only.axes, only.group_size) == ("all-reduce", ("data", "tensor"), 4)
    assert only.payload == 32 * 32 * BF16


def program(*lines: str, computations: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    add = "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %sum.0 = f32[] add(%a, %b)\n}\n\n"
    return f"HloModule m\n\n{add}{computations}\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','tensor'}", ("data", "tensor")),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "fsdp")),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0':(2)2}", ("fsdp",)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0':(1)2}", ("data",)),
    ],
)
def test_groups_are_read_in_every_form(groups: str, axes: tuple[str, ...]) -> None:
    line = f"%r = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add"
    (only,) = collectives(program(line), SHAPE)
    assert only.axes == axes
    assert only.group_size == 2 ** len(axes)


def test_asynchronous_collectives_count_once() -> None:
    exchanges = collectives(
        program(
            "%s = ((f32[8]{0}, bf16[4]{0}), (f32[16]{0}, bf16[8]{0})) all-gather-start(%x, %y),"
            " replica_groups=[4,2]<=[8], dimensions={0}",
            "%d = (f32[16]{0}, bf16[8]{0}) all-gather-done(%s)",
            "%p = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x),"
            " source_target_pairs={{0,2},{2,0}}",
            "%q = f32[8]{0} collective-permute-done(%p)",
            "%a = ((f32[8]{0}), f32[4]{0}, u32[]) async-start(%x), calls=%wrapped",
            "%b = f32[4]{0} async-done(%a), calls=%wrapped",
            computations="%wrapped (x: f32[8]) -> f32[4] {\n"
            "  ROOT %w = f32[4]{0} reduce-scatter(%x), replica_groups=[4,2]<=[8],"
            " dimensions={0}, to_apply=%add\n}\n",
        ),
        SHAPE,
    )
    assert [(x.kind, x.payload, x.axes) for x in exchanges] == [
        ("all-gather", 16 * F32 + 8 * BF16, ("tensor",)),
        ("collective-permute", 8 * F32, ("fsdp",)),
        ("reduce-scatter", 8 * F32, ("tensor",)),
    ]


def test_a_collective_in_a_loop_of_unknown_length_raises() -> None:
    loop = "%loop = f32[8]{0} while(%x), condition=%until, body=%inside"
    computations = (
        "%until (x: f32[8]) -> pred[] {\n  ROOT %u = pred[] constant(true)\n}\n\n"
        "%inside (x: f32[8]) -> f32[8] {\n  ROOT %sum = f32[8]{0} all-reduce(%x), "
        "replica_groups={}, to_apply=%add\n}\n"
    )
    with pytest.raises(ValueError, match="got sum in a loop of unknown length"):
        collectives(program(loop, computations=computations), SHAPE)
    known = loop + ', backend_config={"known_trip_count":{"n":"3"}}'
    (only,) = collectives(program(known, computations=computations), SHAPE)
    assert only.runs == 3
    # The compiler of TPUs leaves it to the condition, which ends what JAX counts from 0.
    counted = computations.replace(
        "  ROOT %u = pred[] constant(true)",
        "  %n = s32[]{:T(128)} constant(7)\n"
        "  ROOT %u = pred[]{:T(512)} compare(%i, %n), direction=LT",
    )
    (only,) = collectives(program(loop, computations=counted), SHAPE)
    assert only.runs == 7


def test_missing_replica_groups_raise() -> None:
    with pytest.raises(ValueError, match="expected replica groups"):
        collectives(program("%r = f32[8]{0} all-reduce(%x), to_apply=%add"), SHAPE)
