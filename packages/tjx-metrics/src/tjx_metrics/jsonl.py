"""Metrics as JSON lines: one object a line, each with its ``step``.

Numbers that are not finite have no form in JSON; they are written as the strings "NaN",
"Infinity" and "-Infinity", which `float` (and JavaScript's ``Number``) reads back.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tjx_metrics.atomic import write_atomically
from tjx_metrics.trackers import Scalar, as_number

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlTracker:
    """Append metrics to a JSON-lines file, each line handed to the system as it is logged.

    Hyperparameters and summary, which belong to no step, go to ``NAME.hyperparameters.json`` and
    ``NAME.summary.json`` beside the file, each only where it is logged.

    Parameters
    ----------
    path : str or Path
        The file, such as ``run/metrics.jsonl``; its folder is made where missing.
    resume_step : int or None
        Step from which the run goes on. Lines of later steps, and a last line that a crash cut
        short, are dropped first (in one atomic replacement), so that no step stands twice; -1
        drops all. None is a new run, for which the file must be missing or empty.

    Raises
    ------
    ValueError
        When `resume_step` is None and the file has content, when it is below -1, or when a line
        other than the last is not a metrics object.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "metrics.jsonl"
    >>> tracker = JsonlTracker(path)
    >>> tracker.log({"train/loss": 3.5}, step=10)
    >>> tracker.log({"train/loss": float("nan")}, step=20)
    >>> tracker.finish()
    >>> print(path.read_text(), end="")
    {"step": 10, "train/loss": 3.5}
    {"step": 20, "train/loss": "NaN"}
    >>> tracker = JsonlTracker(path, resume_step=10)
    >>> tracker.finish()
    >>> read_metrics(path)
    [{'step': 10, 'train/loss': 3.5}]
    >>> folder.cleanup()
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        if resume_step is None:
            if self.path.exists() and self.path.stat().st_size > 0:
                raise ValueError(
                    f"{self.path} already holds metrics: pass resume_step=S to go on after step S "
                    "(-1 to begin anew), or choose another path"
                )
        elif resume_step < -1:
            raise ValueError(f"resume_step={resume_step}: must be at least -1; -1 begins anew")
        elif self.path.exists():
            _keep_steps_up_to(self.path, resume_step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8", newline="\n")

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Write the settings to ``NAME.hyperparameters.json``; what is no JSON as its text."""
        self._write_beside("hyperparameters", hyperparameters)

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Append one line.

        Parameters
        ----------
        metrics : mapping from str to scalar
            Numbers of Python, NumPy or JAX. The name ``step`` is taken.
        step : int
            Steps done when the numbers were taken.

        Raises
        ------
        ValueError
            When a metric is no single number or is called ``step``, or after `finish`.
        """
        if self._file.closed:
            raise ValueError(f"{self.path} is finished: log before finish, or open it again")
        if "step" in metrics:
            raise ValueError("a metric is called 'step': that name holds the step; rename it")
        line = {"step": int(step)} | {
            name: _jsonable(as_number(name, value)) for name, value in metrics.items()
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the results to ``NAME.summary.json``; what is no JSON as its text."""
        self._write_beside("summary", summary)

    def finish(self) -> None:
        """Bring all lines to the disk and close the file. Twice is once."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _write_beside(self, kind: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(_jsonable(content), allow_nan=False, indent=2, default=str)
        write_atomically(self.path.with_suffix(f".{kind}.json"), (text + "\n").encode())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a metrics file, also one that is being written.

    Parameters
    ----------
    path : str or Path
        A file that `JsonlTracker` wrote. A last line that is not whole is left out.

    Returns
    -------
    list of dict
        One per line, in the file's order; numbers that are not finite are floats again.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    ValueError
        When a line other than the last is not a metrics object.
    """
    records = [record for _, record in _lines(Path(path))]
    return [
        {
            name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value
            for name, value in record.items()
        }
        for record in records
    ]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Parse a file into (line without its end, object); a torn last line is left out."""
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        del lines[-1]
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            whole = isinstance(record, dict) and isinstance(record.get("step"), int)
        except ValueError:  # not JSON, or not UTF-8
            whole = False
        if whole:
            parsed.append((line, record))
        elif number < len(lines):
            raise ValueError(
                f"{path}, line {number}: must be a JSON object with an integer 'step'; the file is "
                "damaged or not a metrics file, mend or move it"
            )
    return parsed


def _keep_steps_up_to(path: Path, step: int) -> None:
    kept = [line + b"\n" for line, record in _lines(path) if record["step"] <= step]
    content = b"".join(kept)
    if content != path.read_bytes():
        write_atomically(path, content)


def _jsonable(value: Any) -> Any:
    """Give what is not finite as a string, at any depth; leave the rest."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
