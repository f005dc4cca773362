"""Orbax reads what we write, and we read what Orbax writes, bit for bit."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tjx_ckpt import Checkpointer, orbax_specs, read_orbax, write_orbax
from tjx_ckpt.main import main
from tjx_ckpt.pytree import flatten

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
