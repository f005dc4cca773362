"""Durable, atomic replacement of small files."""

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: bytes | str, *, mode: int = 0o644) -> None:
    """Replace a file so that readers and crashes see the old content or the new, never a part.

    The content is written to a temporary file ``.NAME.tmp-*`` in the same folder, flushed to disk
    and renamed. A killed process can leave the temporary file behind.

    Parameters
    ----------
    path : Path
        The file. Its folder must exist.
    content : bytes or str
        The whole content; a str is encoded as UTF-8.
    mode : int
        Permission bits of the file, independent of the process's umask.

    Raises
    ------
    OSError
        If the folder is missing or the file cannot be written; the old file is unchanged.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder, "config.yaml"), "seed: 1")
    ...     Path(folder, "config.yaml").read_text()
    'seed: 1'
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.tmp-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fchmod(file.fileno(), mode)  # mkstemp creates the file with mode 0600
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_path(path.parent)  # makes the rename durable


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk.

    Parameters
    ----------
    path : Path
        File or folder that this process may read.

    Raises
    ------
    OSError
        If it cannot be opened or flushed.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "shard").mkdir()
    ...     fsync_path(Path(folder))
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
