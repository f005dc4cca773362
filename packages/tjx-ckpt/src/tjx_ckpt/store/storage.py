"""Where checkpoints lie: a local folder, or a place that fsspec reaches (s3://, gs://, ...)."""

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable


class WrongFileError(OSError):
    """A file of a checkpoint ends too early, or is no regular file: damage, not an I/O error."""


@runtime_checkable
class FileWriter(Protocol):
    """Takes the bytes of a new file, one part after another."""

    def __call__(self, data: Any, /) -> None:
        """Write all of ``data``."""


@runtime_checkable
class FileReader(Protocol):
    """An open file of a checkpoint; may be read by several threads."""

    @property
    def size(self) -> int:
        """Bytes of the file."""

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """Fill ``buffer`` from ``offset`` on.

        Raises
        ------
        WrongFileError
            If the file ends before.
        UnreadableError
            If it cannot be read now.
        """


@runtime_checkable
class Lock(Protocol):
    """The right to write into a directory."""

    @property
    def held(self) -> bool:
        """Whether it is ours."""

    def acquire(self) -> bool:
        """Take it if it is free or already ours."""

    def owner(self) -> str:
        """Return who took it last, as "process 123 on host"."""

    def holder(self) -> str | None:
        """Return who holds it now, ourselves included; None if nobody does."""

    def release(self) -> None:
        """Free it if it is ours."""


@runtime_checkable
class Storage(Protocol):
    """A directory of checkpoints. Steps are visible from `commit` on, and whole."""

    @property
    def lock(self) -> Lock:
        """The right to write here."""

    def __str__(self) -> str:
        """Return the place as its user gave it."""

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, ascending by number."""

    def quarantined(self) -> list[str]:
        """Return the names of the damaged checkpoints that were set aside."""

    def leftovers(self) -> list[str]:
        """Return what killed saves and deletions left, and a save that is under way."""

    def remove_leftovers(self) -> None:
        """Delete what `leftovers` tells."""

    def prepare(self) -> None:
        """Make the directory."""

    def begin(self, step: int) -> None:
        """Make an empty place for a new checkpoint, which `steps` does not show yet."""

    def create(self, step: int, name: str) -> AbstractContextManager[FileWriter]:
        """Open a new file of a begun checkpoint; durable when the context ends."""

    def read_new(self, step: int, name: str) -> bytes:
        """Return a file of a begun checkpoint."""

    def remove_new(self, step: int, name: str) -> None:
        """Delete a file of a begun checkpoint."""

    def commit(self, step: int) -> None:
        """Give a begun checkpoint, whose manifest is written, its name."""

    def abandon(self, step: int) -> None:
        """Delete a begun checkpoint."""

    def discard(self, step: int) -> None:
        """Delete a checkpoint so that a crash never leaves half of it under its name."""

    def quarantine(self, step: int) -> str:
        """Set a damaged checkpoint aside; return its new name."""

    def exists(self, step: int) -> bool:
        """Tell whether a step is there, sound or not."""

    def open(self, step: int, name: str) -> AbstractContextManager[FileReader]:
        """Open a file of a checkpoint.

        Raises
        ------
        FileNotFoundError
            If there is none.
        WrongFileError
            If it is no regular file.
        UnreadableError
            If it cannot be opened now.
        """
