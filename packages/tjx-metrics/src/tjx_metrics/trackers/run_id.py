"""What a run is called where a tracker keeps it, so that a resumed run goes on there."""

import uuid
from pathlib import Path

from tjx_metrics.atomic import write_atomically


def stored_run_id(path: Path, *, new: bool) -> str:
    """Read a run's id; where there is none, or another run begins, make one and write it.

    Parameters
    ----------
    path : Path
        A file of one line in the run's directory.
    new : bool
        Whether a run begins that has nothing of an earlier one in the same directory.

    Returns
    -------
    str
        32 hexadecimal digits.
    """
    if not new and path.exists():
        return path.read_text().strip()
    made = uuid.uuid4().hex
    write_atomically(path, f"{made}\n".encode())
    return made
