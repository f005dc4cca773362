"""Partial restores, dtype conversion, retention and safetensors files."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tjx_ckpt import Checkpointer, MismatchError
from tjx_ckpt.retention import Retention

# JAX declares these without types.
Abstract: Any = jax.ShapeDtypeStruct
P: Any = PartitionSpec

STATE: dict[str, Any] = {
    "params": {"w": np.arange(12, dtype=np.float32).reshape(3, 4) / 7, "ids": np.arange(3)},
    "opt_state": {"mu": np.ones((3, 4), np.float32)},
    "step": np.int32(7),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, STATE)
    return tmp_path


def test_parameters_alone_are_read_without_the_rest(directory: Path) -> None:
    (directory / "7" / "opt_state-00000.safetensors").write_bytes(b"damaged")
    wanted = {"params": STATE["params"]}
    checkpointer = Checkpointer(directory)
    with pytest.raises(MismatchError, match="opt_state/mu: saved, not requested"):
        checkpointer.restore(wanted)
    restored = checkpointer.restore(wanted, partial=True)
    np.testing.assert_array_equal(restored["params"]["w"], STATE["params"]["w"])
    with pytest.raises(MismatchError, match="params/other: requested, not saved"):
        checkpointer.restore({"params": {"other": np.zeros(1)}}, partial=True)


def test_floats_are_converted_only_with_cast(directory: Path) -> None:
    checkpointer = Checkpointer(directory)
    half = {"params": {"w": Abstract((3, 4), ml_dtypes.bfloat16, sharding=None)}}
    with pytest.raises(MismatchError, match="requested dtype bfloat16"):
        checkpointer.restore(half, partial=True)
    restored = checkpointer.restore(half, partial=True, cast=True)["params"]["w"]
    assert restored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        np.asarray(restored), STATE["params"]["w"].astype(ml_dtypes.bfloat16)
    )
    with pytest.raises(MismatchError, match="ids: requested dtype float32"):
        checkpointer.restore({"params": {"ids": np.zeros(3, np.float32)}}, partial=True, cast=True)


def test_other_programs_read_the_files(directory: Path) -> None:
    params = safetensors.numpy.load_file(directory / "7" / "params-00000.safetensors")
    assert params.keys() == {"params/w", "params/ids"}
    np.testing.assert_array_equal(params["params/w"], STATE["params"]["w"])


def test_sharded_arrays_are_stored_in_pieces_and_restored_on_other_meshes(tmp_path: Path) -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    values = np.arange(8 * 12, dtype=np.float32).reshape(8, 12)
    saved = {"w": jax.device_put(values, NamedSharding(mesh, P("x", "y")))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, saved)
        checkpointer.wait()
        stored = safetensors.numpy.load_file(tmp_path / "1" / "state-00000.safetensors")
        assert set(stored) == {
            f"w[{4 * row}:{4 * row + 4},{3 * column}:{3 * column + 3}]"
            for row in range(2)
            for column in range(4)
        }
        for spec in (P("y", "x"), P(("y", "x")), P(None, "y"), P()):
            target = {"w": Abstract((8, 12), np.float32, sharding=NamedSharding(mesh, spec))}
            np.testing.assert_array_equal(checkpointer.restore(target)["w"], values)
        three = jax.make_mesh((3,), ("z",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
        target = {"w": Abstract((8, 12), np.float32, sharding=NamedSharding(three, P(None, "z")))}
        np.testing.assert_array_equal(checkpointer.restore(target)["w"], values)


def test_replicated_arrays_are_written_once(tmp_path: Path) -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    saved = {"w": jax.device_put(np.arange(8.0), NamedSharding(mesh, P("x")))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, saved)
        checkpointer.wait()
        assert checkpointer.last_save is not None
        stored = safetensors.numpy.load_file(tmp_path / "1" / "state-00000.safetensors")
    assert stored.keys() == {"w[0:4]", "w[4:8]"}


def test_the_newest_periodic_and_best_are_kept(tmp_path: Path) -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 4.0, 50: None, 60: 5.0}
    keeping = {"keep": 2, "keep_every": 40, "keep_best": 1}
    for steps in ((10, 20, 30), (40, 50, 60)):  # the second life knows the losses of the first
        with Checkpointer(tmp_path, **keeping) as checkpointer:  # type: ignore[arg-type]  # by name
            for step in steps:
                metrics = {} if losses[step] is None else {"eval/loss": losses[step]}
                checkpointer.save(step, STATE, metrics=metrics)  # type: ignore[arg-type]  # no None
    assert Checkpointer(tmp_path).steps() == [20, 40, 50, 60]
    assert Checkpointer(tmp_path).metrics(20) == {"eval/loss": 1.0}


@given(
    values=st.dictionaries(st.integers(0, 100), st.floats(), max_size=12),
    keep=st.integers(1, 4),
    every=st.none() | st.integers(1, 10),
    best=st.integers(0, 3),
)
def test_only_checkpoints_outside_of_the_policy_are_pruned(
    values: dict[int, float], keep: int, every: int | None, best: int
) -> None:
    retention = Retention(keep=keep, every=every, best=best, metric="accuracy", mode="max")
    gone = retention.prunable({step: {"accuracy": value} for step, value in values.items()})
    kept = sorted(values.keys() - set(gone))
    assert kept[-keep:] == sorted(values)[-keep:]
    assert all(every is None or step % every for step in gone)
    comparable = [value for value in values.values() if value == value]
    for step in gone:
        better = sum(value >= values[step] for value in comparable) - 1
        assert values[step] != values[step] or better >= best
    due = [step for step in values if every is not None and step % every == 0]
    assert len(kept) <= keep + best + len(due)


def test_discard_after_deletes_later_checkpoints(directory: Path) -> None:
    with Checkpointer(directory, keep=5) as checkpointer:
        for step in (8, 9, 10):
            checkpointer.save(step, STATE)
        assert checkpointer.discard_after(8) == [9, 10]
        assert checkpointer.steps() == [7, 8]
        checkpointer.save(9, STATE)
        checkpointer.wait()
        assert checkpointer.steps() == [7, 8, 9]


def test_the_manifest_has_package_versions(directory: Path) -> None:
    content = json.loads((directory / "7" / "manifest.json").read_text())["content"]
    assert content["versions"]["jax"] == jax.__version__
    assert content["leaves"]["params/w"] == [[3, 4], "float32"]


def test_a_save_reports_duration_and_size(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        nothing = checkpointer.last_save
        checkpointer.save(3, STATE)
        checkpointer.wait()
        report = checkpointer.last_save
    assert nothing is None
    assert report is not None
    assert report.step == 3
    assert 0 < report.blocking_seconds < report.seconds
    assert report.size_bytes == sum(
        path.stat().st_size for path in (tmp_path / "3").glob("*.safetensors")
    )
