"""Files and folders that are written under a temporary name, and what kills leave of them.

The writer holds a lock on what it writes. The kernel frees it when the writer dies, so the next one
can tell an abandoned temporary from one that another process is writing.
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing; their names are on the disk then.

    Without that a power cut may take a folder with all that was flushed in it.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        flush(folder.parent)


def temporary_name(path: Path) -> Path:
    """Return where to write what will be ``path``; another name in each process."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def hold(descriptor: int) -> None:
    """Mark an open file or folder as being written, until it is closed."""
    with contextlib.suppress(OSError):  # a file system without locks: nothing is removed there
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_abandoned(path: Path) -> None:
    """Delete what killed writers of ``path`` left beside it."""
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
    """Yield a folder to fill, which gets its name when the context ends: whole or not at all.

    Parameters
    ----------
    path
        Missing, or an empty folder.

    Raises
    ------
    OSError
        If it cannot be written. Nothing is left then.
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
            flush(file)
        os.fsync(descriptor)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)
    flush(path.parent)


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
