"""Atomic writes: content, permissions, and what a failure leaves."""

import os
from pathlib import Path

import pytest

from tjx_core import write_atomically


@pytest.mark.parametrize(("mode", "expected"), [({}, 0o644), ({"mode": 0o600}, 0o600)])
def test_permissions_do_not_depend_on_the_umask(
    tmp_path: Path, mode: dict[str, int], expected: int
) -> None:
    before = os.umask(0o077)
    try:
        write_atomically(tmp_path / "config.yaml", "seed: é", **mode)
    finally:
        os.umask(before)
    assert (tmp_path / "config.yaml").stat().st_mode & 0o777 == expected
    assert (tmp_path / "config.yaml").read_bytes() == "seed: é".encode()


@pytest.mark.parametrize("call", ["fsync", "fchmod"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_atomically(tmp_path / "a", b"old")

    def fail(*arguments: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_content_is_flushed_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        events.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> Path:
        events.append(f"rename to {target}")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write_atomically(tmp_path / "a", b"x")
    temporary, rename, folder = events
    assert Path(temporary).name.startswith(".a.tmp-")
    assert (rename, folder) == (f"rename to {tmp_path / 'a'}", str(tmp_path))
