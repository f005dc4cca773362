"""Cache folder of prepared data, and file locks between processes."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/tjx/data``, or ``~/.cache/tjx/data`` if the variable is not set."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tjx" / "data"


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; blocks until it is free. The end of a process frees it."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
