"""Damage to checkpoint files is reported and never restored."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_ckpt import (
    AllCheckpointsCorruptError,
    Checkpointer,
    CorruptCheckpointError,
    CorruptCheckpointWarning,
)
from tjx_ckpt.store import manifest as manifest_file

STATE = {
    "params": {"w": np.arange(600, dtype=np.float32).reshape(20, 30), "b": np.arange(3)},
    "opt_state": {"mu": np.ones(8, np.float16)},
    "step": np.int32(5),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with steps 1, 2 and 3; each holds its number in "step"."""
    directory = tmp_path_factory.mktemp("pristine")
    with Checkpointer(directory) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {**STATE, "step": np.int32(step)}, metadata={"loss": 1.0})
    return directory


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    copied: Path = shutil.copytree(pristine, tmp_path / "run")
    return copied


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_by(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(change(path.read_bytes())), None)[1]


DAMAGES = {
    "flipped bit": flip_bit,
    "truncated": damage_by(lambda data: data[: len(data) // 2]),
    "zeroed": damage_by(lambda data: bytes(len(data))),
    "longer": damage_by(lambda data: data + b"x"),
    "removed": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_reported(directory: Path, damage: str) -> None:
    checkpointer = Checkpointer(directory)
    folder = directory / "3"
    files = files_of(folder)
    assert {path.stem.split("-")[0] for path in files} == {
        "manifest",
        "params",
        "opt_state",
        "state",
    }
    for path in files:
        original = path.read_bytes()
        DAMAGES[damage](path)
        name = path.relative_to(folder).as_posix()
        problems = checkpointer.verify(3)
        assert [line.split(":")[0] for line in problems] == [name]
        with pytest.raises(CorruptCheckpointError, match="step 3") as caught:
            checkpointer.restore(STATE, step=3)
        assert name in str(caught.value)
        path.write_bytes(original)
    assert checkpointer.verify(3) == []


def test_exchanged_files_are_reported(directory: Path) -> None:
    first, second = sorted((directory / "3").glob("*.safetensors"))[:2]
    first_bytes, second_bytes = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_bytes)
    second.write_bytes(first_bytes)
    assert len(Checkpointer(directory).verify(3)) == 2


def test_a_checkpoint_with_the_name_of_another_step_is_reported(directory: Path) -> None:
    shutil.rmtree(directory / "3")
    shutil.copytree(directory / "2", directory / "3")
    assert Checkpointer(directory).verify(3) == ["manifest.json: belongs to step 2"]


@settings(max_examples=200)
@given(data=st.data())
def test_any_changed_byte_of_the_manifest_is_reported(pristine: Path, data: st.DataObject) -> None:
    good = (pristine / "3" / manifest_file.MANIFEST_NAME).read_bytes()
    position = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[position] = data.draw(st.integers(0, 255).filter(lambda byte: byte != good[position]))
    with pytest.raises(manifest_file.ManifestError):
        manifest_file.parse(bytes(bad))


def test_a_damaged_newest_step_is_renamed_and_the_previous_one_used(directory: Path) -> None:
    for step in (3, 2):
        flip_bit(directory / str(step) / "params-00000.safetensors")
    with Checkpointer(directory) as checkpointer:
        checkpointer.claim()
        with pytest.warns(CorruptCheckpointWarning, match="using step 1 instead") as caught:
            restored = checkpointer.restore(STATE)
        assert len(caught) == 2
        assert restored["step"] == 1
        assert checkpointer.steps() == [1]
        assert {"3.corrupt", "2.corrupt"} < {path.name for path in directory.iterdir()}
        # The run continues and can save, and lose, the same step again.
        checkpointer.save(3, STATE)
        checkpointer.wait()
        flip_bit(directory / "3" / "manifest.json")
        with pytest.warns(CorruptCheckpointWarning, match=r"renamed to 3\.corrupt\.2"):
            checkpointer.restore(STATE)


def test_all_checkpoints_damaged_raises_again_and_again(directory: Path) -> None:
    for step in (1, 2, 3):
        (directory / str(step) / "manifest.json").unlink()
    for _ in range(2):  # a supervisor starts the run again
        with Checkpointer(directory) as checkpointer:
            with pytest.raises(
                AllCheckpointsCorruptError, match=r"step 2: manifest\.json: missing"
            ):
                checkpointer.restore(STATE)
            assert checkpointer.latest_step() == 3
    for step in (1, 2, 3):
        (directory / str(step)).rename(directory / f"{step}.corrupt")
    with pytest.raises(AllCheckpointsCorruptError, match=r"3\.corrupt"):
        Checkpointer(directory).restore(STATE)


def test_a_reader_does_not_modify_the_directory_of_a_run(directory: Path) -> None:
    with Checkpointer(directory) as run, Checkpointer(directory) as reader:
        run.save(4, STATE)
        run.wait()
        flip_bit(directory / "4" / "manifest.json")
        with pytest.warns(CorruptCheckpointWarning, match="using step 3 instead"):
            reader.restore(STATE)
        assert (directory / "4").exists()


def test_an_intact_restore_does_not_warn(directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Checkpointer(directory).restore(STATE)["step"] == 3
