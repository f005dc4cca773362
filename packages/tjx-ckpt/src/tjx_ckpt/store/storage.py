"""Protocols of storage backends: local folders and object stores (s3://, gs://, ...)."""

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable


class WrongFileError(OSError):
    """A file of a checkpoint is too short or not a regular file: damage, not an I/O error."""


@runtime_checkable
class FileWriter(Protocol):
    """Appends bytes to a new file."""

    def __call__(self, data: Any, /) -> None:
        """Append all of ``data``."""


@runtime_checkable
class FileReader(Protocol):
    """Open file of a checkpoint; thread-safe."""

    @property
    def size(self) -> int:
        """Size of the file in bytes."""

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """Fill a buffer with the bytes from an offset.

        Raises
        ------
        WrongFileError
            If the file is too short.
        UnreadableError
            If the file cannot be read now.
        """


@runtime_checkable
class Lock(Protocol):
    """Lock of a directory for one writer."""

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""

    def acquire(self) -> bool:
        """Acquire the lock if it is free or already held; return whether it is held."""

    def owner(self) -> str:
        """Return the last process that acquired it, as "process 123 on host"."""

    def holder(self) -> str | None:
        """Return the process that holds it, possibly this one, or None."""

    def release(self) -> None:
        """Release the lock if this object holds it."""


@runtime_checkable
class Storage(Protocol):
    """A directory of checkpoints; steps become visible, complete, with `commit`."""

    @property
    def lock(self) -> Lock:
        """Lock for writing to the directory."""

    def __str__(self) -> str:
        """Return the path or URL."""

    def steps(self) -> list[int]:
        """Return the steps with a complete checkpoint, ascending."""

    def quarantined(self) -> list[str]:
        """Return the names of damaged checkpoints that were renamed."""

    def leftovers(self) -> list[str]:
        """Return leftovers of killed saves and deletions, and a save in progress."""

    def remove_leftovers(self) -> None:
        """Delete everything that `leftovers` returns."""

    def prepare(self) -> None:
        """Create the directory."""

    def begin(self, step: int) -> None:
        """Start a new checkpoint, which `steps` does not list yet."""

    def create(self, step: int, name: str) -> AbstractContextManager[FileWriter]:
        """Open a new file of an unfinished checkpoint; durable when the context ends."""

    def read_new(self, step: int, name: str) -> bytes:
        """Return the content of a file of an unfinished checkpoint."""

    def remove_new(self, step: int, name: str) -> None:
        """Delete a file of an unfinished checkpoint."""

    def commit(self, step: int) -> None:
        """Make a checkpoint whose manifest is written visible, atomically."""

    def abandon(self, step: int) -> None:
        """Delete an unfinished checkpoint."""

    def discard(self, step: int) -> None:
        """Delete a checkpoint; a crash never leaves a part of it visible."""

    def quarantine(self, step: int) -> str:
        """Rename a damaged checkpoint; return its new name."""

    def exists(self, step: int) -> bool:
        """Return whether a step has a checkpoint, intact or damaged."""

    def open(self, step: int, name: str) -> AbstractContextManager[FileReader]:
        """Open a file of a checkpoint for reading.

        Raises
        ------
        FileNotFoundError
            If the file is missing.
        WrongFileError
            If it is not a regular file.
        UnreadableError
            If it cannot be opened now.
        """
