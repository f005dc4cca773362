"""Saved states are restored bit for bit on any mesh."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tjx_ckpt import CheckpointConfig, Checkpointer, MismatchError, NoCheckpointError

# JAX declares these without types.
Abstract: Any = jax.ShapeDtypeStruct
P: Any = PartitionSpec


class State(NamedTuple):
    step: Any
    params: dict[str, Any]
    opt_state: tuple[Any, ...]


def make_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((8, 16)).astype(np.float32)
    weights[0, :3] = [np.nan, -0.0, np.inf]
    params = {
        "w": weights,
        "half": rng.standard_normal(16).astype(ml_dtypes.bfloat16),
        "ids": rng.integers(-(2**31), 2**31, 5).astype(np.int32),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }
    state = State(np.int32(seed), params, ((), {"mu": weights * 2, "count": np.int32(7)}, None))
    placed: State = jax.device_put(state)
    return placed


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: Abstract(x.shape, x.dtype, sharding=x.sharding), state)


def leaves(tree: Any) -> list[tuple[Any, Any]]:
    return list(jax.tree_util.tree_leaves_with_path(tree))


def assert_same_bits(actual: Any, expected: Any) -> None:
    for (name, a), (other, b) in zip(leaves(actual), leaves(expected), strict=True):
        assert name == other
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_every_kind_of_leaf_is_restored_exactly(tmp_path: Path) -> None:
    state = make_state(3)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, metadata={"loss": 0.1, "nested": {"list": [1, None, "é"]}})
        restored = checkpointer.restore(abstract(state))
        assert checkpointer.metadata(3) == {"loss": 0.1, "nested": {"list": [1, None, "é"]}}
    assert_same_bits(restored, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_numpy_leaves_are_restored_as_numpy(tmp_path: Path) -> None:
    state = {"a": np.arange(4), "scalar": np.float32(2.5)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        restored = checkpointer.restore(state)
    assert isinstance(restored["a"], np.ndarray)
    assert_same_bits(restored, state)


def test_buffers_donated_after_save_do_not_change_the_checkpoint(tmp_path: Path) -> None:
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: -x - 1, state), donate_argnums=0)
    start = {"w": np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)}
    state = overwrite(jax.device_put(start))  # compiled before the race
    expected = jax.tree.map(np.array, state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        for _ in range(5):
            state = overwrite(state)
        restored = checkpointer.restore(abstract(state))
    assert_same_bits(restored, expected)


def test_arrays_changed_after_save_do_not_change_the_checkpoint(tmp_path: Path) -> None:
    array = np.arange(1 << 18)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": array})
        array[:] = -1
        restored = checkpointer.restore({"a": array})
    np.testing.assert_array_equal(restored["a"], np.arange(1 << 18))


@pytest.mark.parametrize(("saved_on", "restored_on"), [(1, 8), (8, 1), (8, 4)])
def test_a_state_moves_between_meshes_bitwise(
    tmp_path: Path, saved_on: int, restored_on: int
) -> None:
    def sharding(count: int) -> NamedSharding:
        devices = jax.devices()[:count]
        mesh = jax.make_mesh((count,), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices)
        return NamedSharding(mesh, P(None, "fsdp"))

    values = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jax.device_put(values, sharding(saved_on))})
        target = Abstract((4, 16), jnp.float32, sharding=sharding(restored_on))
        restored = checkpointer.restore({"w": target})["w"]
    assert restored.sharding == target.sharding
    assert len(restored.addressable_shards) == restored_on
    assert_same_bits(restored, values)


def test_only_the_newest_are_kept_in_numeric_order(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        for step in (2, 9, 10, 100):
            checkpointer.save(step, {"a": np.int32(step)})
        checkpointer.wait()
        assert checkpointer.steps() == [10, 100]
        assert checkpointer.latest_step() == 100
        assert checkpointer.restore({"a": np.int32(0)}, step=10)["a"] == 10
        assert checkpointer.restore({"a": np.int32(0)})["a"] == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writer", "10", "100"]


def test_mismatches_are_listed_by_leaf(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, {"w": np.zeros((2, 3), np.float32), "old": np.zeros(1)})
        wanted = {"w": np.zeros((2, 4), ml_dtypes.bfloat16), "new": np.zeros(1)}
        with pytest.raises(MismatchError) as caught:
            checkpointer.restore(wanted)
    assert str(caught.value).splitlines() == [
        "checkpoint of step 4 does not fit the requested state:",
        "new: requested, not saved",
        "old: saved, not requested",
        "w: requested shape (2, 4), saved (2, 3)",
        "w: requested dtype bfloat16, saved float32",
    ]


def test_of_many_mismatches_the_first_are_listed(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, {f"x{i}": np.zeros(1) for i in range(1234)})
        with pytest.raises(MismatchError) as caught:
            checkpointer.restore({})
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == 101
    assert lines[-1] == "... and 1,134 more differences"


def test_invalid_arguments_raise_before_anything_is_written(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with Checkpointer(directory) as checkpointer:
        with pytest.raises(NoCheckpointError, match="no checkpoint in"):
            checkpointer.restore({})
        with pytest.raises(NoCheckpointError, match="step 3"):
            checkpointer.verify(3)
        with pytest.raises(ValueError, match="a: got int; expected an array"):
            checkpointer.save(1, {"a": 1})
        with pytest.raises(ValueError, match="name: got dtype <U1"):
            checkpointer.save(1, {"name": np.array("x")})
        with pytest.raises(ValueError, match="plain JSON"):
            checkpointer.save(1, {"a": np.zeros(1)}, metadata={"x": object()})
        with pytest.raises(ValueError, match="got -1; expected 0 or more"):
            checkpointer.save(-1, {"a": np.zeros(1)})
        assert not directory.exists()
        checkpointer.save(5, {"a": np.zeros(1)})
        with pytest.raises(ValueError, match="expected more than 5"):
            checkpointer.save(5, {"a": np.zeros(1)})


def test_config_reports_all_problems() -> None:
    with pytest.raises(ValueError, match=r"every: got 0.*\n.*keep: got -1"):
        CheckpointConfig(every=0, keep=-1)
    with pytest.raises(ValueError, match="keep: got 0"):
        Checkpointer("unused", keep=0)
