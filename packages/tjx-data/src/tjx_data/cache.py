"""Where prepared data is kept, and how two processes take turns in making it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/tjx/data``, or ``~/.cache/tjx/data`` where that is not set."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tjx" / "data"


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for it; a process that dies gives it back."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
