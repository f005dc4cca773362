"""Sharding rules, meshes and batches: specs and error messages."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tjx_core import ConfigError
from tjx_parallel import (
    AXES,
    STORAGE_AXES,
    DistributedConfig,
    MeshConfig,
    ShardingRules,
    batch_process,
    batch_sharding,
    initialize,
    is_main,
    make_mesh,
    param_shardings,
    shard_batch,
    state_shardings,
)
from tjx_parallel.mesh import across_slices

# JAX declares these without types.
Abstract: Any = jax.ShapeDtypeStruct
P: Any = PartitionSpec


def shape(*sizes: int) -> Any:
    return Abstract(sizes, np.float32)


@given(st.permutations(range(3)), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_one_axis_fills_what_is_left(order: list[int], a: int, b: int, c: int) -> None:
    names = [("data", "fsdp", "tensor")[index] for index in order]
    sizes: Any = dict(zip(names, (a, b, -1), strict=True))
    assert MeshConfig(**{"data": 1, **sizes}).axis_sizes(a * b * c)[names[2]] == c


def test_a_mesh_has_all_axes_in_auto_mode_and_uses_each_device_once() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == (1, 2, 2, 1, 1, 2)
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_wrong_mesh_sizes_raise_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"mesh: got fsdp=3, .* a multiple of 3 devices; .* of 8"):
        make_mesh(MeshConfig(fsdp=3))
    with pytest.raises(ValueError, match=r"data=2 x tensor=2, which needs 4 devices; expected 8"):
        make_mesh(MeshConfig(data=2, tensor=2))
    with pytest.raises(ValueError, match=r"all sizes 1, which needs 1 devices; expected 8"):
        make_mesh(MeshConfig(data=1))


def test_all_config_errors_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        MeshConfig(tensor=0, context=-1, fsdp=-1, virtual_stages=1, rules=("mlp=node", "batch="))
    problems = caught.value.problems
    paths = [("tensor",), ("data", "fsdp", "context"), ("virtual_stages",), *[("rules",)] * 2]
    assert [problem.paths for problem in problems] == paths
    assert "got -1, as fsdp and context; expected -1 for at most one axis" in str(problems[1])
    assert "got 'mlp=node'; expected a row such as" in str(problems[3])
    assert "got 'batch='; expected no row for batch" in str(problems[4])


def test_slices_are_joined_along_the_axes_with_least_communication() -> None:
    sizes = {"stage": 2, "data": 4, "fsdp": 2, "context": 1, "expert": 1, "tensor": 2}
    assert across_slices(sizes, 2) == (1, 2, 1, 1, 1, 1)
    assert across_slices(sizes, 8) == (2, 4, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="got 32 slices with the mesh data=4 x stage=2 x fsdp=2"):
        across_slices(sizes, 32)


def test_rules_from_config_rows_and_sequence_parallel() -> None:
    rules = ShardingRules.of(MeshConfig(sequence_parallel=False, rules=("mlp=fsdp+tensor",)))
    assert rules.mesh_axes("residual") == rules.mesh_axes("seq") == ("context",)
    assert rules.mesh_axes("mlp") == ("fsdp", "tensor")
    assert ShardingRules().mesh_axes("residual") == ("context", "tensor")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    # What is gathered to be used is left out, and is not given to another dimension.
    spec = ShardingRules().spec(mesh, ("embed", "embed"), (8, 8), without=STORAGE_AXES)
    assert spec == P(None, None)


def test_rules_can_be_replaced_and_added() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4))
    rules = ShardingRules({"embed": ("data", "fsdp"), "memory": ("fsdp",)})
    assert rules.spec(mesh, ("embed", "mlp"), (8, 8)) == P(("data", "fsdp"), None)
    assert rules.spec(mesh, ("memory",), (8,)) == P("fsdp")


def test_a_mesh_axis_shards_only_the_first_matching_dimension() -> None:
    rules = ShardingRules()
    spec = rules.spec(make_mesh(MeshConfig(fsdp=8)), ("embed", "embed"), (8, 8))
    assert spec == P("fsdp", None)


def test_unknown_axes_raise() -> None:
    with pytest.raises(ValueError, match="with 'node'; expected mesh axes"):
        ShardingRules({"embed": ("node",)})
    with pytest.raises(ValueError, match="expected mesh axes"):
        ShardingRules({"embed": "fsdp"})  # a tuple was forgotten
    with pytest.raises(ValueError, match=r"got 'embedd'.*; did you mean embed\?"):
        ShardingRules().mesh_axes("embedd")


def test_all_parameters_that_do_not_divide_are_reported() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    logical = {"wte": ("vocab", "embed"), "b": {"up": ("embed", "mlpp"), "old": None}}
    shapes = {"wte": shape(50257, 6), "b": {"up": shape(4, 4), "new": shape(2)}}
    with pytest.raises(ValueError, match="expected a multiple of") as caught:
        param_shardings(mesh, ShardingRules(), logical, shapes)
    text = str(caught.value)
    assert "wte: got size 50257 of dimension 0 (vocab); expected a multiple of tensor = 2" in text
    assert "wte: got size 6 of dimension 1 (embed); expected a multiple of fsdp = 4" in text
    assert "b/up: logical_axis: got 'mlpp'; expected an axis with a rule" in text
    assert "; did you mean mlp?" in text
    assert "b/new: got no logical axes" in text
    assert "b/old: got logical axes; expected none" in text
    with pytest.raises(
        ValueError, match=r"w: got 1 logical axes \('embed',\); expected one for each"
    ):
        param_shardings(mesh, ShardingRules(), {"w": ("embed",)}, {"w": shape(4, 4)})


def test_state_shardings_use_the_longest_parameter_path() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    logical = {"w": ("embed", "mlp"), "inner": {"w": ("mlp", "embed")}, "plain": None}
    shapes = {"w": shape(8, 8), "inner": {"w": shape(8, 8)}, "plain": shape(3)}
    params = param_shardings(mesh, ShardingRules(), logical, shapes)
    assert params["plain"].spec == P(None)
    factored = {"w": shape(8), "inner": {"w": shape(1, 1)}, "plain": shape(3)}
    state = {"step": shape(), "params": shapes, "opt": ({"mu": shapes, "rows": factored}, None)}
    result: Any = state_shardings(state, params)
    whole = NamedSharding(mesh, P())
    assert result["params"] == params
    assert result["opt"][0]["mu"] == params
    assert result["opt"][0]["rows"]["w"] == whole
    assert result["opt"][0]["rows"]["inner"]["w"] == whole
    assert result["step"] == whole


def test_batches_are_sharded_in_order_over_data_and_fsdp() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    batch = shard_batch(mesh, {"tokens": rows, "weights": rows[:, 0]})
    assert batch["tokens"].sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["tokens"], rows)
    np.testing.assert_array_equal(batch["weights"], rows[:, 0])
    assert batch_process(mesh) == (0, 1)


def test_a_batch_that_does_not_divide_raises_with_both_numbers() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4))
    with pytest.raises(ValueError, match=r"tokens: 6 rows .* = 2 x 4 x 1 = 8") as caught:
        shard_batch(mesh, {"tokens": np.zeros((6, 2)), "loss": np.array(1.0)})
    assert "loss: has no rows" in str(caught.value)


def test_one_process_needs_no_initialization() -> None:
    initialize()
    assert is_main()
    assert not jax.distributed.is_initialized()


def test_incomplete_distributed_config_raises() -> None:
    with pytest.raises(ValueError, match="num_processes: got none") as caught:
        DistributedConfig(coordinator="somewhere")
    assert "process_id: got none" in str(caught.value)
    assert "expected host:port" in str(caught.value)
    with pytest.raises(ValueError, match="process_id: got 2; expected 0 to 1"):
        DistributedConfig(coordinator="127.0.0.1:1", num_processes=2, process_id=2)
