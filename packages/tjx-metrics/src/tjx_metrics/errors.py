"""Errors and warnings of metrics files and trackers. Imports the standard library only."""

from pathlib import Path


class RecordError(OSError):
    """Raised when a metrics file cannot be written, for example on a full disk.

    Parameters
    ----------
    cause : OSError
        The error of the operating system.

    Attributes
    ----------
    path : Path
        The metrics file.
    lost : int
        Number of buffered lines that are lost.
    """

    def __init__(self, path: Path, cause: OSError, *, lost: int = 0) -> None:
        lines = f"; {lost} buffered lines are lost" if lost else ""
        super().__init__(
            cause.errno,
            f"{path} cannot be written: {type(cause).__name__}: {cause}{lines}; "
            "all lines already in the file are complete",
        )
        self.path, self.lost = path, lost

    def __str__(self) -> str:
        return str(self.strerror)


class RecordWarning(UserWarning):
    """Warns that a metrics file is damaged, or that its lines are buffered after a failed write."""


class TrackerWarning(UserWarning):
    """Warns that a tracker failed or lost records; `metrics.jsonl` still has all of them."""
