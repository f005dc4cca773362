"""Operating-system errors while reading do not count as damage."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tjx_ckpt import Checkpointer, ClaimError, UnreadableError
from tjx_ckpt.store import retry

STATE = {"params": {"w": np.arange(40, dtype=np.float32)}, "step": np.int32(0)}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path / "run") as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {**STATE, "step": np.int32(step)})
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSES_S", (0.0, 0.0, 0.0))


def failing(call: Callable[..., Any], number: int, times: int) -> Callable[..., Any]:
    """Return ``call``, which fails the first ``times`` times."""
    left = [None] * times

    def faulty(*arguments: Any, **options: Any) -> Any:
        if left:
            left.pop()
            raise OSError(number, os.strerror(number))
        return call(*arguments, **options)

    return faulty


@pytest.mark.parametrize("call", ["open", "preadv", "scandir"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_temporary_read_errors_are_retried(
    directory: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    checkpointer = Checkpointer(directory)
    monkeypatch.setattr(os, call, failing(getattr(os, call), number, 3))
    assert checkpointer.restore(STATE)["step"] == 2


@pytest.mark.parametrize("call", ["open", "preadv", "scandir"])
def test_permanent_read_errors_rename_no_checkpoint(
    directory: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with Checkpointer(directory) as checkpointer:
        checkpointer.claim()
        before = sorted(directory.iterdir())
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing(getattr(os, call), errno.EIO, 1000))
            with pytest.raises(UnreadableError, match="cannot be read now"):
                checkpointer.restore(STATE)
            with pytest.raises(UnreadableError, match="cannot be read now"):
                checkpointer.restore(STATE, step=1)
            with pytest.raises(UnreadableError, match="cannot be read now"):
                checkpointer.verify(1)
        assert sorted(directory.iterdir()) == before
        assert checkpointer.restore(STATE)["step"] == 2


def test_a_link_as_lock_file_does_not_change_its_target(directory: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("of another user")
    (directory / ".writer").unlink()
    (directory / ".writer").symlink_to(precious)
    assert Checkpointer(directory).restore(STATE)["step"] == 2
    with pytest.raises(ClaimError, match="remove this link"):
        Checkpointer(directory).claim()
    assert precious.read_text() == "of another user"


def test_a_fifo_as_lock_file_does_not_block(directory: Path) -> None:
    (directory / ".writer").unlink()
    os.mkfifo(directory / ".writer")
    with pytest.raises(ClaimError, match="not a regular file"):
        Checkpointer(directory).claim()


def test_a_reader_does_not_lock_delete_or_rename(directory: Path) -> None:
    (directory / "3.tmp").mkdir()
    (directory / "2" / "manifest.json").unlink()
    (directory / ".writer").unlink()
    before = sorted(directory.iterdir())
    with pytest.warns(UserWarning, match="using step 1 instead"):
        assert Checkpointer(directory).restore(STATE)["step"] == 1
    assert sorted(directory.iterdir()) == before


def test_links_and_files_as_directory_raise_with_advice(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    for name in ("dangling", "file"):
        assert Checkpointer(tmp_path / name).latest_step() is None
        with pytest.raises(ClaimError, match="a folder is required there"):
            Checkpointer(tmp_path / name).claim()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EACCES, errno.EMFILE, errno.EROFS])
def test_a_directory_that_cannot_be_claimed_raises_with_advice(
    directory: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "open", failing(os.open, number, 1))
    with pytest.raises(ClaimError, match=r"cannot be claimed: .*; \w+"):
        Checkpointer(directory).claim()
