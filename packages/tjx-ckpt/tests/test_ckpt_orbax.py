"""Orbax reads what we write, and we read what Orbax writes, bit for bit."""

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tjx_ckpt import (
    Checkpointer,
    CheckpointError,
    DirectoryInUseError,
    MismatchError,
    SaveError,
    UnreadableError,
    orbax_specs,
    read_orbax,
    write_orbax,
)
from tjx_ckpt.main import main
from tjx_ckpt.pytree import flatten
from tjx_core import ConfigError

# JAX declares these without types.
Abstract: Any = jax.ShapeDtypeStruct
P: Any = PartitionSpec

RNG = np.random.default_rng(0)
WEIGHTS: dict[str, Any] = {
    "decoder": {
        "kernel": RNG.standard_normal((3, 4)).astype(np.float32),
        "half": RNG.standard_normal(5).astype(ml_dtypes.bfloat16),
        "nan": np.array([np.nan, -0.0, np.inf], np.float16),
        "eight": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
    },
    "flags": np.array([True, False]),
    "count": np.array(7, np.int32),
    "key": np.array([3, 2**32 - 1], np.uint32),
}


def assert_same_bits(actual: Any, expected: Any) -> None:
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for key, array in expected.items():
        found = np.asarray(actual[key])
        assert (found.shape, found.dtype) == (array.shape, array.dtype), key
        assert found.tobytes() == array.tobytes(), key


@pytest.fixture(autouse=True)
def _transfers() -> Any:
    """Orbax transfers arrays to and from devices by itself."""
    with jax.transfer_guard("allow"):
        yield


def restore(path: Path) -> Any:
    """Restore a checkpoint as Orbax's documentation does."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def maxtext(folder: Path) -> Path:
    """Write a training state as MaxText does: an item of a manager, params below params."""
    state = {
        "step": 3,
        "params": {"params": WEIGHTS},
        "opt_state": ({"mu": np.ones(2, np.float32)}, None, ()),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder, item_names=("items",), options=options) as manager:
        for step in (2, 10):
            manager.save(step, args=ocp.args.Composite(items=ocp.args.PyTreeSave(state)))
    return folder


def test_orbax_reads_what_is_written(tmp_path: Path) -> None:
    write_orbax(tmp_path / "ours", {"params": WEIGHTS})
    assert_same_bits(restore(tmp_path / "ours"), {"params": WEIGHTS})
    assert_same_bits(read_orbax(tmp_path / "ours"), {"params": WEIGHTS})


def test_export_and_import_keep_every_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(5, {"params": WEIGHTS, "step": np.int32(5)})
    words = ["export", str(tmp_path / "run"), "--format", "orbax", "--only", "params"]
    assert main([*words, "--out", str(tmp_path / "orbax")]) == 0
    assert "7 arrays" in capsys.readouterr().out
    assert_same_bits(restore(tmp_path / "orbax"), WEIGHTS)
    assert main([*words, "--out", str(tmp_path / "orbax")]) == 2
    assert "expected a new folder" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "other"), "--separator", "."]) == 2
    assert "--separator" in capsys.readouterr().err

    words = ["import", str(tmp_path / "orbax"), "--step", "8"]
    assert main([*words, "--out", str(tmp_path / "back")]) == 0
    with Checkpointer(tmp_path / "back") as checkpointer:
        assert checkpointer.steps() == [8]
        assert_same_bits(checkpointer.restore(WEIGHTS), WEIGHTS)


def test_reads_maxtext_trees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = maxtext(tmp_path / "checkpoints")
    for path in (folder, folder / "10", folder / "10" / "items"):
        arrays = read_orbax(path, ["step", "params/params/decoder/half"])
        assert arrays.keys() == {"step", "params/params/decoder/half"}
        assert int(arrays["step"]) == 3
        assert_same_bits(arrays["params/params/decoder/half"], WEIGHTS["decoder"]["half"])
    specs = orbax_specs(folder)
    assert specs["opt_state/0/mu"].shape == (2,)
    assert specs["params/params/decoder/eight"].dtype == "float8_e4m3fn"
    words = ["import", str(folder), "--only", "params/params", "--out", str(tmp_path / "back")]
    assert main(words) == 0
    assert "step 10: 7 arrays" in capsys.readouterr().out
    with Checkpointer(tmp_path / "back") as checkpointer:
        assert_same_bits(checkpointer.restore(WEIGHTS), WEIGHTS)


def test_errors_name_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="folder of one Orbax checkpoint"):
        orbax_specs(tmp_path)
    with pytest.raises(ValueError, match="without elements, empty; "):
        write_orbax(tmp_path / "a", {"empty": np.zeros((0, 2)), "w": np.ones(1)})
    write_orbax(tmp_path / "a", {"w": np.ones(1)})
    with pytest.raises(ValueError, match="which exists"):
        write_orbax(tmp_path / "a", {"w": np.ones(1)})
    with pytest.raises(ValueError, match="keys: got v; expected keys of"):
        read_orbax(tmp_path / "a", ["v"])
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ValueError, match=r"pip install 'tjx-ckpt\[orbax\]'"):
        orbax_specs(tmp_path / "a")


def test_the_package_does_not_import_orbax() -> None:
    code = "import sys, tjx_ckpt, tjx_ckpt.main; tjx_ckpt.Checkpointer; tjx_ckpt.read_orbax; "
    code += "print([name for name in sys.modules if name.startswith('orbax')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Moments(NamedTuple):
    mu: Any
    count: Any


def training_state(step: int) -> dict[str, Any]:
    """Return a state with JAX and NumPy arrays, a sharded array and a NamedTuple."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.device_put(np.arange(8.0).reshape(4, 2) + step, NamedSharding(mesh, P("x")))
    return {
        "params": {**WEIGHTS, "sharded": sharded},
        "opt_state": (Moments({"w": np.full(3, step, np.float32)}, np.int32(step)), None),
    }


def test_checkpointer_saves_what_orbax_reads(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, format="orbax", keep=1, keep_best=1) as checkpointer:
        for step, loss in ((1, 3.0), (2, 1.0), (3, float("nan")), (4, 2.0)):
            state = training_state(step)
            checkpointer.save(step, state, metadata={"seed": step}, metrics={"eval/loss": loss})
            state["opt_state"][0].mu["w"][:] = -1  # the buffers belong to the caller again
        checkpointer.wait()
        assert checkpointer.steps() == [2, 4]
        assert checkpointer.last_save is not None
        assert checkpointer.last_save.step == 4
        with pytest.raises(DirectoryInUseError):
            Checkpointer(tmp_path, format="orbax").claim()
    # Orbax alone: the steps, the state, the metrics and the metadata.
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [2, 4]
        assert_same_bits(manager.restore(4, args=ocp.args.StandardRestore()), training_state(4))
        assert manager.metrics(2) == {"eval/loss": 1.0}
        assert manager.metadata(4).custom_metadata == {"seed": 4}
    with Checkpointer(tmp_path, format="orbax") as checkpointer:
        assert (checkpointer.latest_step(), checkpointer.metadata(4)) == (4, {"seed": 4})
        assert checkpointer.metrics(4) == {"eval/loss": 2.0}
        abstract = training_state(0)
        restored = checkpointer.restore(abstract)
        assert_same_bits(restored, training_state(4))
        assert type(restored["opt_state"][0]) is Moments
        assert restored["opt_state"][1] is None
        sharded = restored["params"]["sharded"]
        assert sharded.sharding == abstract["params"]["sharded"].sharding
        assert isinstance(restored["params"]["count"], np.ndarray)
        half = {"params": {"sharded": Abstract((4, 2), "bfloat16")}}
        cast = checkpointer.restore(half, 2, partial=True, cast=True)["params"]["sharded"]
        assert cast.dtype == "bfloat16"
        np.testing.assert_array_equal(np.asarray(cast, np.float32), np.arange(8).reshape(4, 2) + 2)
        assert checkpointer.discard_after(2) == [4]
        assert checkpointer.steps() == [2]


def test_checkpointer_reads_steps_of_maxtext(tmp_path: Path) -> None:
    with Checkpointer(maxtext(tmp_path), format="orbax") as checkpointer:
        assert checkpointer.steps() == [2, 10]
        restored = checkpointer.restore({"params": {"params": WEIGHTS}}, partial=True)
        assert_same_bits(restored["params"]["params"], WEIGHTS)
        assert (checkpointer.metadata(10), checkpointer.metrics(10)) == ({}, {})
        with pytest.raises(MismatchError, match="opt_state/0/mu: saved, not requested"):
            checkpointer.restore({"params": {"params": WEIGHTS}})


def test_failed_saves_in_orbax_format_leave_earlier_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        assert (tmp_path / "2.tmp" / "default").is_dir(), "before the rename"
        raise OSError("full")

    with Checkpointer(tmp_path, format="orbax") as checkpointer:
        checkpointer.save(1, {"w": np.ones(2)})
        checkpointer.save(2, {"w": np.ones(2)}, before_commit=fail)
        with pytest.raises(SaveError, match="saving step 2 failed: OSError: full"):
            checkpointer.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == [".writer", "1"]
    leftover = tmp_path / "3.tmp.orbax-checkpoint-tmp-17"  # of a process killed during a save
    leftover.mkdir()
    with Checkpointer(tmp_path, format="orbax") as checkpointer:
        checkpointer.save(3, {"w": np.ones(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writer", "1", "3"]
    (tmp_path / "3" / "default" / "_METADATA").write_text("{")
    with Checkpointer(tmp_path, format="orbax") as checkpointer:
        with pytest.raises(UnreadableError, match="3 cannot be read now"):
            checkpointer.restore({"w": np.ones(2)})
        assert checkpointer.steps() == [1, 3]


def test_what_the_orbax_format_lacks_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="did you mean orbax"):
        Checkpointer(tmp_path, format="orbx")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a local folder"):
        Checkpointer("memory://bucket/run", format="orbax")
    with Checkpointer(tmp_path / "orbax", format="orbax") as checkpointer:
        with pytest.raises(ValueError, match="without elements, empty; "):
            checkpointer.save(1, {"empty": np.zeros((0, 2))})
        checkpointer.save(1, {"w": np.ones(2)})
        checkpointer.wait()
        with pytest.raises(ValueError, match="Orbax stores no checksums"):
            checkpointer.verify(1)
        with pytest.raises(ValueError, match="Orbax writes no manifest"):
            checkpointer.manifest(1)
    with Checkpointer(tmp_path / "tjx") as checkpointer:
        checkpointer.save(1, {"w": np.ones(2)})
    # A directory has one format.
    for folder, other in (("orbax", "tjx"), ("tjx", "orbax")):
        with Checkpointer(tmp_path / folder, format=other) as checkpointer:  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=f"format: got '{other}', and .* holds"):
                checkpointer.save(2, {"w": np.ones(2)})
            with pytest.raises(CheckpointError, match=r"format='orbax'|no pytree"):
                checkpointer.restore({"w": np.ones(2)})
            assert checkpointer.steps() == [1]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="got 'orbax' with 2 processes"):
        Checkpointer(tmp_path, format="orbax")
