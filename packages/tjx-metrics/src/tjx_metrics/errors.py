"""What can go wrong with a record on disk. Standard library only."""

from pathlib import Path


class RecordError(OSError):
    """A record of a run could not be written: the disk is full, gone, or not ours to write.

    Attributes
    ----------
    path : Path
        The file.
    lost : int
        Lines that waited in memory and are lost with it.
    """

    def __init__(self, path: Path, cause: OSError, *, lost: int = 0) -> None:
        lines = f"; {lost} lines that waited for it are lost" if lost else ""
        super().__init__(
            cause.errno,
            f"{path} cannot be written: {type(cause).__name__}: {cause}{lines}; "
            "what stands in it is whole",
        )
        self.path, self.lost = path, lost

    def __str__(self) -> str:
        return str(self.strerror)


class RecordWarning(UserWarning):
    """A record of a run cannot be written now; its lines wait in memory."""


class TrackerWarning(UserWarning):
    """A tracker fails, or has lost records; the run goes on, and metrics.jsonl has them all."""
