"""Files of pieces, manifests and the fallback to earlier checkpoints."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tjx_ckpt import Checkpointer, CorruptCheckpointWarning
from tjx_ckpt.restore_fallback import read_newest
from tjx_ckpt.store import manifest as manifest_file
from tjx_ckpt.store.checkpoint_reader import Box, CheckpointReader
from tjx_ckpt.store.local_folder import LocalFolder
from tjx_ckpt.store.verification import DamagedError

P: Any = PartitionSpec  # JAX declares it without types

STATE: dict[str, Any] = {
    "params": {"w": np.arange(640, dtype=np.float32).reshape(16, 40), "b": np.arange(3)},
    "opt_state": {"mu": np.ones(8, np.float16)},
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, STATE)
    return tmp_path


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_partial_restore_reads_only_its_pieces(tmp_path: Path) -> None:
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=devices)
    values = np.arange(8 * 4, dtype=np.float32).reshape(8, 4)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jax.device_put(values, NamedSharding(mesh, P("x")))})
        checkpointer.wait()
        content = checkpointer.manifest(1)
    flip_last_bit(tmp_path / "1" / "state-00000.safetensors")  # in the last device's rows
    with CheckpointReader(LocalFolder(tmp_path), 1, content) as reader:
        boxes = [Box((0, 1), (3, 2)), Box((2, 0), (4, 4))]
        parts = reader.boxes("w", boxes)
        np.testing.assert_array_equal(parts[0], values[0:3, 1:3])
        np.testing.assert_array_equal(parts[1], values[2:6])
        with pytest.raises(
            DamagedError, match=r"state-00000.safetensors: the checksum differs \(w\)"
        ):
            reader.leaf("w")


def test_arrays_start_at_multiples_of_64_bytes(directory: Path) -> None:
    content = Checkpointer(directory).manifest(2)
    offsets = [s.offset for f in content.files.values() for s in f.pieces if s.size % 64 == 0]
    assert offsets
    assert all(offset % 64 == 0 for offset in offsets)


def test_partial_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: really_write(file, data[:777]))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, STATE)
        checkpointer.wait()
        assert checkpointer.verify(1) == []


def test_a_file_that_is_truncated_while_it_is_read_raises(directory: Path) -> None:
    name = "params-00000.safetensors"
    with LocalFolder(directory).open(2, name) as file:
        os.truncate(directory / "2" / name, 100)
        with pytest.raises(OSError, match="ends at byte 100"):
            file.read_into(0, memoryview(bytearray(200)))


def change_key(content: Any) -> None:
    content["files"]["params-00000.safetensors"]["pieces"][0][0] = "params/other"


def lose_a_piece(content: Any) -> None:
    del content["files"]["params-00000.safetensors"]["pieces"][0]


def move_a_piece(content: Any) -> None:
    content["files"]["params-00000.safetensors"]["pieces"][0][1] = [1, 0]


def lengthen_a_piece(content: Any) -> None:
    content["files"]["params-00000.safetensors"]["pieces"][0][3] += 4


def climb_out(content: Any) -> None:
    content["files"]["../../secret"] = content["files"].pop("params-00000.safetensors")


def claim_a_huge_leaf(content: Any) -> None:
    content["leaves"]["params/w"] = [[2**62, 2**62], "float32"]


def claim_an_endless_axis(content: Any) -> None:
    content["leaves"]["params/none"] = [[0, 2**70], "float32"]


def overlap(content: Any) -> None:
    pieces = content["files"]["params-00000.safetensors"]["pieces"]
    (whole,) = [piece for piece in pieces if piece[0] == "params/w"]
    half = [whole[0], [0, 0], [8, 40], whole[3] // 2, whole[4]]
    pieces[pieces.index(whole) :] = [half, half]


def hold_objects(content: Any) -> None:
    content["leaves"]["params/none"] = [[0], "object"]


def use_an_unknown_dtype(content: Any) -> None:
    content["leaves"]["params/w"][1] = "object0"


@pytest.mark.parametrize(
    "change",
    [change_key, lose_a_piece, move_a_piece, lengthen_a_piece, climb_out, claim_a_huge_leaf,
     claim_an_endless_axis, overlap, hold_objects, use_an_unknown_dtype],
)  # fmt: skip
def test_a_contradictory_manifest_with_a_valid_checksum_raises(
    directory: Path, change: Callable[[Any], None]
) -> None:
    content = json.loads((directory / "2" / "manifest.json").read_text())["content"]
    assert manifest_file.parse(manifest_file.with_checksum(content)).step == 2
    change(content)
    with pytest.raises(manifest_file.ManifestError, match="unreadable"):
        manifest_file.parse(manifest_file.with_checksum(content))


def test_a_manifest_of_impossible_size_is_not_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_file, "_MAX_BYTES", 100)
    (line,) = Checkpointer(directory).verify(2)
    assert "more than 100" in line


def test_every_damaged_file_is_reported(directory: Path) -> None:
    for name in ("params", "opt_state"):
        flip_last_bit(directory / "2" / f"{name}-00000.safetensors")
    with pytest.warns(CorruptCheckpointWarning, match=r"opt_state-.*\(opt_state/mu\); params-"):
        Checkpointer(directory).restore(STATE)


def test_renaming_a_damaged_checkpoint_does_not_lock_the_directory(directory: Path) -> None:
    flip_last_bit(directory / "2" / "params-00000.safetensors")
    reader = Checkpointer(directory)
    with pytest.warns(CorruptCheckpointWarning, match="using step 1 instead"):
        reader.restore(STATE)
    assert (directory / "2").exists()
    with Checkpointer(directory) as run:
        with pytest.warns(CorruptCheckpointWarning, match="using step 1 instead"):
            run.restore(STATE)
        with pytest.warns(CorruptCheckpointWarning, match=r"renamed to 2\.corrupt"):
            run.save(2, STATE)
        run.wait()
        assert run.verify(2) == []


def test_a_step_that_is_pruned_while_it_is_read_is_not_damaged(directory: Path) -> None:
    storage = LocalFolder(directory)

    def read(step: int) -> int:
        if step == 2:
            storage.discard(2)
            raise DamagedError("params-00000.safetensors: missing")
        return step

    assert read_newest(storage, read) == (1, [])
    assert storage.quarantined() == []
