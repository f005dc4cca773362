"""JSON lines with which a benchmark process reports its cases to the slice runner.

A process prints one line when a case begins and one when it ends, flushed, so that the runner knows
which case was running when the process crashes, hangs or runs out of time.
"""

import json
from typing import Any, Literal

Json = dict[str, Any]
Status = Literal["ok", "failed", "skipped"]


def begin(case: str) -> None:
    """Print the start of a case."""
    _print({"begin": case})


def finish(case: str, status: Status, **figures: Any) -> None:
    """Print the result of a case.

    Parameters
    ----------
    case : str
        Name of the case.
    status : {"ok", "failed", "skipped"}
        Skipped and failed cases have a figure "reason".
    **figures
        Measurements, serializable as JSON.
    """
    _print({"case": case, "status": status, **figures})


def _print(content: Json) -> None:
    # Start a new line: other output, such as that of pytest, may have left a partial one.
    print(f"\n{json.dumps(content)}", flush=True)


def read(line: str) -> Json | None:
    """Return the content of a line that `begin` or `finish` printed; None for other output."""
    if not line.startswith(('{"begin": ', '{"case": ')):
        return None
    try:
        content: Json = json.loads(line)
    except ValueError:
        return None
    return content
