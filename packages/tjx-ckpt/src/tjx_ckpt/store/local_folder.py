"""Checkpoints in a local or shared folder, with crash-safe renames.

``12``                a complete checkpoint of step 12
``12.tmp``            a save in progress, or the leftover of a killed one; Orbax appends to the name
``12.discarded.tmp``  a checkpoint that is being deleted
``12.corrupt``        a damaged checkpoint, kept for inspection
"""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tjx_ckpt.store.retry import with_retries
from tjx_ckpt.store.storage import WrongFileError
from tjx_ckpt.store.temporary_files import make_folder
from tjx_ckpt.store.writer_lock import WriterLock
from tjx_core import fsync_path

_LEFTOVER = re.compile(r"\d+(\.discarded)?\.tmp(\.orbax-checkpoint-tmp.*)?")
_QUARANTINED = re.compile(r"(\d+)\.corrupt(\.\d+)?")


class LocalFolder:
    """A folder of checkpoints; implements `tjx_ckpt.store.storage.Storage`.

    Parameters
    ----------
    path
        Absolute path; `prepare` creates it. A shared file system must support ``flock``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = WriterLock(path)

    def __str__(self) -> str:
        return str(self.path)

    def steps(self) -> list[int]:
        """Return the steps with a complete checkpoint, ascending."""
        names = [name for name, is_folder in self._entries() if is_folder]
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))

    def quarantined(self) -> list[str]:
        """Return the names of damaged checkpoints that were renamed."""
        return sorted(name for name, _ in self._entries() if _QUARANTINED.fullmatch(name))

    def leftovers(self) -> list[str]:
        """Return leftovers of killed saves and deletions, and a save in progress."""
        return sorted(name for name, _ in self._entries() if _LEFTOVER.fullmatch(name))

    def remove_leftovers(self) -> None:
        """Delete everything that `leftovers` returns."""
        for name in self.leftovers():
            shutil.rmtree(self.path / name)

    def prepare(self) -> None:
        """Create the folder."""
        make_folder(self.path)

    def begin(self, step: int) -> None:
        """Create the temporary folder of a new checkpoint, which `steps` does not list yet."""
        self.abandon(step)
        self._temporary(step).mkdir()

    @contextlib.contextmanager
    def create(self, step: int, name: str) -> Iterator["_LocalWriter"]:
        """Open a new file of an unfinished checkpoint; fsynced when the context ends."""
        with (self._temporary(step) / name).open("xb", buffering=0) as file:
            yield _LocalWriter(file.fileno())
            os.fsync(file.fileno())

    def read_new(self, step: int, name: str) -> bytes:
        """Return the content of a file of an unfinished checkpoint."""
        return (self._temporary(step) / name).read_bytes()

    def remove_new(self, step: int, name: str) -> None:
        """Delete a file of an unfinished checkpoint."""
        (self._temporary(step) / name).unlink()

    def commit(self, step: int) -> None:
        """Rename a written and flushed checkpoint to its final name."""
        fsync_path(self._temporary(step))
        self._temporary(step).rename(self.path / str(step))
        fsync_path(self.path)

    def abandon(self, step: int) -> None:
        """Delete an unfinished checkpoint."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._temporary(step))

    def discard(self, step: int) -> None:
        """Delete a checkpoint; a crash never leaves a part of it under its name."""
        discarded = self.path / f"{step}.discarded.tmp"
        if discarded.exists():
            shutil.rmtree(discarded)
        (self.path / str(step)).rename(discarded)
        fsync_path(self.path)  # after a power failure no partially deleted checkpoint has its name
        shutil.rmtree(discarded)

    def quarantine(self, step: int) -> str:
        """Rename a damaged checkpoint to ``N.corrupt`` (``N.corrupt.2``, ... if that exists)."""
        target = self.path / f"{step}.corrupt"
        number = 2
        while target.exists():
            target = self.path / f"{step}.corrupt.{number}"
            number += 1
        (self.path / str(step)).rename(target)
        fsync_path(self.path)
        return target.name

    def exists(self, step: int) -> bool:
        """Return whether a step has a checkpoint, intact or damaged."""
        path = self.path / str(step)

        def is_folder() -> bool:
            try:
                return stat.S_ISDIR(path.stat().st_mode)
            except FileNotFoundError:
                return False

        return with_retries(str(path), is_folder)

    @contextlib.contextmanager
    def open(self, step: int, name: str) -> Iterator["_LocalReader"]:
        """Open a file of a checkpoint for reading."""
        path = self.path / str(step) / name
        descriptor = with_retries(str(path), lambda: _open_regular(path))
        try:
            yield _LocalReader(path, descriptor)
        finally:
            os.close(descriptor)

    def _temporary(self, step: int) -> Path:
        return self.path / f"{step}.tmp"

    def _entries(self) -> list[tuple[str, bool]]:
        """Return the names in the folder, each with whether it is a folder."""

        def scan() -> list[tuple[str, bool]]:
            try:
                with os.scandir(self.path) as entries:
                    return [(entry.name, entry.is_dir()) for entry in entries]
            except (FileNotFoundError, NotADirectoryError):
                return []

        return with_retries(str(self.path), scan)


class _LocalWriter:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(self, data: Any, /) -> None:
        rest = memoryview(data)
        while rest:  # a write can be partial
            rest = rest[os.write(self._descriptor, rest) :]


class _LocalReader:
    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self.size = os.fstat(descriptor).st_size

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        opened = [self._descriptor]

        def read() -> None:
            if opened:
                _fill(opened.pop(), offset, buffer)
                return
            descriptor = _open_regular(self._path)  # a stale NFS handle stays stale
            try:
                _fill(descriptor, offset, buffer)
            finally:
                os.close(descriptor)

        with_retries(str(self._path), read)


def _fill(descriptor: int, offset: int, buffer: memoryview) -> None:
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if not count:
            raise WrongFileError(f"ends at byte {offset}")
        offset, buffer = offset + count, buffer[count:]


def _open_regular(path: Path) -> int:
    """Open a regular file for reading, without blocking on a FIFO in its place."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise WrongFileError("not a regular file")
    return descriptor
