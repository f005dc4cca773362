"""Temporary files and folders that are renamed when complete, and cleanup after killed writers.

A writer holds a file lock on its temporary. The kernel releases it when the writer dies, which
distinguishes abandoned temporaries from temporaries that another process is writing.
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tjx_core import fsync_path


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and flush their names to disk.

    Otherwise a power failure could lose the folder with all flushed files in it.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        fsync_path(folder.parent)


def temporary_name(path: Path) -> Path:
    """Return the temporary name of ``path``, which is unique to this process."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def hold(descriptor: int) -> None:
    """Lock an open file or folder as being written, until it is closed."""
    with contextlib.suppress(OSError):  # without file locks `remove_abandoned` removes nothing
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_abandoned(path: Path) -> None:
    """Delete temporaries of ``path`` that killed writers left."""
    name = re.compile(re.escape(path.name) + r"\.[0-9]+\.tmp")
    for found in [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]:
        with contextlib.suppress(OSError):
            descriptor = os.open(found, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if found.is_dir():
                    shutil.rmtree(found)
                else:
                    found.unlink()
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``path`` when the context ends without error.

    Parameters
    ----------
    path
        Missing, or an empty folder.

    Yields
    ------
    Path
        The temporary folder; it is deleted after an error.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    temporary = temporary_name(path)
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        hold(descriptor)
        yield temporary
        for file in temporary.iterdir():
            fsync_path(file)
        os.fsync(descriptor)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)
    fsync_path(path.parent)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that is renamed to ``path`` when the context ends without error.

    Parameters
    ----------
    path
        The file; an existing one is replaced.

    Yields
    ------
    BinaryIO
        The temporary file, open for writing; it is deleted after an error.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            hold(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)
