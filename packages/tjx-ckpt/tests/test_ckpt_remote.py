"""Contract tests of local folders and object stores.

``memory://`` stands for an object store everywhere; S3 is asked where it can be (see conftest.py).
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from checkpoint_place import PATIENT, STATE, Place, state, storage
from fsspec.implementations.memory import MemoryFileSystem
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tjx_ckpt import (
    AllCheckpointsCorruptError,
    Checkpointer,
    CorruptCheckpointError,
    CorruptCheckpointWarning,
    DirectoryInUseError,
    SaveError,
    StorageError,
    list_steps,
)
from tjx_ckpt.store import remote_folder
from tjx_ckpt.store.backends import is_remote

# JAX declares these without types.
Abstract: Any = jax.ShapeDtypeStruct
P: Any = PartitionSpec


def test_a_sharded_state_is_restored_exactly_and_partially(place: Place) -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    values = np.arange(8 * 12, dtype=np.float32).reshape(8, 12)
    saved = {"w": jax.device_put(values, NamedSharding(mesh, P("x", "y"))), "params": STATE}
    with place.checkpointer() as checkpointer:
        checkpointer.save(3, saved, metadata={"seed": 1}, metrics={"eval/loss": 2.5})
        target = {"w": Abstract((8, 12), np.float32, sharding=NamedSharding(mesh, P("y")))}
        restored = checkpointer.restore(target, partial=True)["w"]
        assert restored.sharding == target["w"].sharding
        np.testing.assert_array_equal(restored, values)
        everything = checkpointer.restore(saved)
        for actual, expected in zip(
            jax.tree.leaves(everything), jax.tree.leaves(saved), strict=True
        ):
            assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()
        assert checkpointer.metadata(3) == {"seed": 1}
        assert checkpointer.metrics(3) == {"eval/loss": 2.5}
        assert checkpointer.last_save is not None
        names = [name for name in place.names("3") if name.endswith(".safetensors")]
        assert checkpointer.last_save.size_bytes == sum(
            len(place.read(f"3/{name}")) for name in names
        )


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: data[:0],
    "longer": lambda data: data + b"x",
}


def test_damage_to_any_file_is_reported(place: Place) -> None:
    place.save(3)
    checkpointer = place.checkpointer()
    names = place.names("3")
    assert len(names) == 4
    for damage in ("removed", *DAMAGES):
        for name in names:
            original = place.read(f"3/{name}")
            if damage == "removed":
                place.remove(f"3/{name}")
            else:
                place.write(f"3/{name}", DAMAGES[damage](original))
            assert [line.split(":")[0] for line in checkpointer.verify(3)] == [name]
            with pytest.raises(CorruptCheckpointError, match=name):
                checkpointer.restore(STATE, step=3)
            place.write(f"3/{name}", original)
    assert checkpointer.verify(3) == []


def test_a_damaged_newest_step_is_renamed_and_the_previous_one_used(place: Place) -> None:
    place.save(1, 2, 3)
    place.flip_bit("3/params-00000.safetensors")
    place.remove("2/manifest.json")
    before = {name: place.read(f"3/{name}") for name in place.names("3")}
    with place.checkpointer() as checkpointer:
        checkpointer.claim()
        with pytest.warns(CorruptCheckpointWarning, match="using step 1 instead") as caught:
            assert checkpointer.restore(STATE)["step"] == 1
        assert len(caught) == 2
        assert checkpointer.steps() == [1]
        # The renamed checkpoint has all files.
        assert {
            name: place.read(f"3.corrupt/{name}") for name in place.names("3.corrupt")
        } == before
        # The run continues and can save, and lose, the same step again.
        checkpointer.save(3, STATE)
        checkpointer.wait()
        place.flip_bit("3/manifest.json")
        with pytest.warns(CorruptCheckpointWarning, match=r"renamed to 3\.corrupt\.2"):
            checkpointer.restore(STATE)
    assert storage(place).quarantined() == ["2.corrupt", "3.corrupt", "3.corrupt.2"]
    assert storage(place).leftovers() == []


def test_all_checkpoints_damaged_raises_again_and_again(place: Place) -> None:
    place.save(1, 2)
    for step in (1, 2):
        place.remove(f"{step}/manifest.json")
    for _ in range(2):  # a supervisor starts the run again
        with (
            place.checkpointer() as checkpointer,
            pytest.raises(AllCheckpointsCorruptError, match=r"step 2: manifest\.json: missing"),
        ):
            checkpointer.restore(STATE)
    assert list_steps(place.directory) == [1, 2]


def test_the_newest_are_kept_in_numeric_order(place: Place) -> None:
    assert list_steps(place.directory) == []
    with place.checkpointer(keep=2) as checkpointer:
        for step in (2, 9, 10, 100):
            checkpointer.save(step, state(step))
        checkpointer.wait()
        assert checkpointer.steps() == [10, 100]
        assert checkpointer.restore(STATE)["step"] == 100
        assert checkpointer.discard_after(10) == [100]
        assert checkpointer.steps() == [10]
    assert {name.split("/")[0] for name in place.names()} == {"10"}


def test_foreign_objects_are_ignored(place: Place) -> None:
    neighbour = Place(f"{place.directory}2")
    neighbour.save(7)
    strangers = ["notes/manifest.json", "007/manifest.json", "8.corrupted/a", "README", "-1/a"]
    for name in strangers:
        place.write(name, b"{}")
    place.write("6.tmp/a" if not is_remote(place.directory) else "6/a", b"left by a killed save")
    with place.checkpointer() as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.claim()
    assert place.names() == sorted(strangers)
    assert neighbour.checkpointer().verify(7) == []


def test_two_runs_cannot_save_into_one_directory(place: Place) -> None:
    with place.checkpointer() as first:
        first.save(1, STATE)
        first.wait()
        storage(place).begin(2)  # as the first run's next save
        with storage(place).create(2, "params") as write:
            write(b"alive")
        with place.checkpointer(period_s=PATIENT) as second:
            assert storage(place).leftovers()
            with pytest.raises(DirectoryInUseError, match=rf"process {os.getpid()} on"):
                second.save(2, STATE)
            place.flip_bit("1/manifest.json")
            with pytest.raises(AllCheckpointsCorruptError):
                second.restore(STATE)
    with place.checkpointer() as second:
        second.claim()
        assert not storage(place).leftovers()
        second.save(2, STATE)
    assert list_steps(place.directory) == [1, 2]


@pytest.mark.parametrize("failing", ["begin", "create", "read_new", "commit"])
def test_a_failed_save_raises_once_and_leaves_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_arguments: object) -> None:
        raise ConnectionError("no answer")

    with place.checkpointer() as checkpointer:
        checkpointer.save(1, STATE)
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(type(storage(place)), failing, fail)
            checkpointer.save(2, STATE)
            with pytest.raises(SaveError, match=r"step 2 failed: ConnectionError: no answer"):
                checkpointer.wait()
        assert not storage(place).leftovers()
        checkpointer.save(3, STATE)
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3]


def test_a_store_that_does_not_respond_is_not_damage(
    memory: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.save(1, 2)
    before = memory.names()

    def fail(*_arguments: object, **_settings: object) -> None:
        raise TimeoutError("no answer")

    for method in ("cat_file", "info", "find"):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, method, fail)
            with pytest.raises(StorageError, match="TimeoutError: no answer"):
                memory.checkpointer().restore(STATE)
    assert memory.names() == before
    assert memory.checkpointer().restore(STATE)["step"] == 2


def test_a_truncated_upload_is_not_a_checkpoint(
    memory: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = remote_folder._RemoteWriter.__call__
    with memory.checkpointer() as checkpointer:
        with monkeypatch.context() as patch:

            def lose_a_byte(self: Any, data: Any) -> None:
                cut(self, data)
                self._file.truncate(self.size - 1)

            patch.setattr(remote_folder._RemoteWriter, "__call__", lose_a_byte)
            checkpointer.save(1, STATE)
            with pytest.raises(SaveError, match="bytes, the store has"):
                checkpointer.wait()
        assert memory.names() == []


def test_invalid_urls_and_missing_backends_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"write a local folder without file://"):
        Checkpointer("file:///tmp/run")
    with pytest.raises(ValueError, match=r"expected a path, or the URL"):
        Checkpointer("simplecache::memory://run")
    with pytest.raises(ValueError, match=r"expected a protocol that fsspec knows, .* not s4://"):
        Checkpointer("s4://bucket/run")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(ImportError, match=r"pip install 'tjx-ckpt\[remote\]' gcsfs"):
            Checkpointer("gs://bucket/run")
        patch.setitem(sys.modules, "fsspec", None)
        with pytest.raises(
            ImportError, match=r"need fsspec; run: pip install 'tjx-ckpt\[remote\]'"
        ):
            Checkpointer("memory://bucket/run")
