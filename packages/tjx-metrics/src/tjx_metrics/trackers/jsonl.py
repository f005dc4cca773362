"""JSON-lines tracker: one JSON object per line, each with its ``step``.

Numbers are stored directly, histograms as ``{"counts": [...], "edges": [...]}`` and texts as
``{"text": "..."}``, so that readers of numbers can skip objects.

JSON has no NaN or infinity: they are stored as the strings "NaN", "Infinity" and "-Infinity", which
`float` and JavaScript's ``Number`` parse.
"""

import io
import json
import math
import os
import threading
import warnings
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tjx_core import fsync_path, write_atomically
from tjx_metrics.errors import RecordError, RecordWarning
from tjx_metrics.trackers.base import Histogram, Scalar, as_histograms, as_numbers
from tjx_metrics.trackers.jsonl_file import truncate_or_repair


class JsonlTracker:
    """Append metrics to a JSON-lines file, writing each line as it is logged.

    Hyperparameters and summary have no step and are written to ``NAME.hyperparameters.json`` and
    ``NAME.summary.json`` beside the file.

    The file never holds part of a line: a partial write (on a full disk) is truncated.

    Parameters
    ----------
    path : str or Path
        The file, such as ``run/metrics.jsonl``; its folder is created if missing.
    resume_step : int or None
        Step from which the run resumes. Lines of later steps and an incomplete last line are
        removed, so that no step is recorded twice; -1 removes all lines. Records of this very step
        that the file already has are not repeated. None is a new run: the file must be missing or
        empty. Only the end of the file is read, so lines must be in the order of their steps, as
        `log` writes them. If a damaged line is found there, it is removed with a warning and the
        original file is kept as ``NAME.damaged``.
    on_error : "stop" or "continue"
        If a line cannot be written: raise, or buffer it and write it with a later one.
    max_kept : int
        Maximum number of buffered lines; beyond that, the oldest are dropped with a warning.

    Attributes
    ----------
    logged_bytes : int
        Size of the file once all logged lines, including buffered ones, are written.

    Raises
    ------
    ValueError
        If `resume_step` is None and the file has content, or if it is below -1.
    RecordError
        If the file cannot be truncated or opened.

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
    >>> from tjx_metrics import read_metrics
    >>> read_metrics(path)
    [{'step': 10, 'train/loss': 3.5}]
    >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | Path,
        resume_step: int | None = None,
        *,
        on_error: Literal["stop", "continue"] = "stop",
        max_kept: int = 10_000,
    ) -> None:
        self.path = Path(path)
        self._on_error = on_error
        self._buffer: deque[bytes] = deque()
        self._max_kept = max_kept
        self._resume_step = resume_step
        self._recorded: set[frozenset[str]] = set()  # names in each line of the resumed step
        self._file: io.FileIO | None = None
        self._closing = threading.Lock()
        if resume_step is None:
            if self.path.exists() and self.path.stat().st_size > 0:
                raise ValueError(
                    f"{self.path} already holds metrics: pass resume_step=S to resume from step S "
                    "(-1 to start over), or choose another path"
                )
        elif resume_step < -1:
            raise ValueError(f"resume_step: got {resume_step}; expected at least -1 (start over)")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is not None and self.path.exists():
                self._recorded = truncate_or_repair(self.path, resume_step)
            self._file = self.path.open("ab", buffering=0)
            self.logged_bytes = os.fstat(self._file.fileno()).st_size
            fsync_path(self.path.parent)  # makes the name of a new file durable
        except OSError as error:
            raise RecordError(self.path, error) from error

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Write ``NAME.hyperparameters.json``; values that JSON lacks are written as strings."""
        self._write_beside("hyperparameters", hyperparameters)

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Append one line of metrics.

        Parameters
        ----------
        metrics : mapping from str to scalar
            Python, NumPy or JAX numbers. The name ``step`` is reserved.
        step : int
            Number of finished steps; not below that of the previous line.

        Raises
        ------
        ValueError
            If a metric is not a single number or is called ``step``, or after `finish`.
        RecordError
            If the line cannot be written and `on_error` is "stop".
        """
        self._append(as_numbers(metrics), step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Append one line of histograms; raises as `log`."""
        self._append(
            {
                name: {"counts": counts.tolist(), "edges": edges.tolist()}
                for name, (counts, edges) in as_histograms(histograms).items()
            },
            step,
        )

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Append one line of texts; raises as `log`."""
        self._append({name: {"text": text} for name, text in texts.items()}, step)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``NAME.summary.json``; values that JSON lacks are written as strings."""
        self._write_beside("summary", summary)

    def flush(self) -> None:
        """Flush the file to disk, so that a power failure loses no written line. Thread-safe.

        Raises
        ------
        RecordError
            If flushing fails and `on_error` is "stop"; otherwise it warns.
        """
        with self._closing:
            if self._file is None:
                return  # `finish` has flushed
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                if self._on_error == "stop":
                    raise RecordError(self.path, error) from error
                warnings.warn(
                    f"{self.path} cannot be flushed ({error}): a power cut may lose its last lines",
                    RecordWarning,
                    stacklevel=2,
                )

    def finish(self) -> None:
        """Write buffered lines, flush and close the file. Idempotent.

        Raises
        ------
        RecordError
            If buffered lines cannot be written or flushing fails.
        """
        with self._closing:
            if self._file is None:
                return
            file, held = self._file, len(self._buffer)
            try:
                self._write_buffer()
                os.fsync(file.fileno())
            except OSError as error:
                raise RecordError(self.path, error, lost=held) from error
            finally:
                self._file = None
                file.close()

    def _append(self, values: dict[str, Any], step: int) -> None:
        if self._file is None:
            raise ValueError(f"{self.path} is finished: log before finish, or open it again")
        if "step" in values:
            raise ValueError("metrics: got the name 'step', which is reserved; rename it")
        record = {"step": int(step)} | values
        if step == self._resume_step and frozenset(record) in self._recorded:
            return
        self._buffer.append((json.dumps(_jsonable(record), allow_nan=False) + "\n").encode())
        self.logged_bytes += len(self._buffer[-1])
        try:
            self._write_buffer()
        except OSError as error:
            if self._on_error == "stop":
                self._buffer.clear()  # the run stops and will repeat these steps
                raise RecordError(self.path, error) from error
            self._warn_buffered(error)

    def _write_buffer(self) -> None:
        """Write the buffered lines, each completely or not at all; raises OSError."""
        assert self._file is not None
        while self._buffer:
            size = os.fstat(self._file.fileno()).st_size
            rest = self._buffer[0]
            try:
                while rest:  # on a nearly full disk, a write is partial before the next one fails
                    rest = rest[self._file.write(rest) :]
            except OSError:
                os.ftruncate(self._file.fileno(), size)
                raise
            self._buffer.popleft()

    def _warn_buffered(self, error: OSError) -> None:
        """Warn when the first line is buffered, and whenever a line is dropped."""
        if len(self._buffer) > self._max_kept:
            self._buffer.popleft()
            text = f"more than {self._max_kept} lines are buffered: the oldest is lost"
        elif len(self._buffer) == 1:
            text = "lines are buffered in memory until it can be"
        else:
            return
        warnings.warn(
            f"{self.path} cannot be written ({error}); {text}", RecordWarning, stacklevel=4
        )

    def _write_beside(self, kind: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(_jsonable(content), allow_nan=False, indent=2, default=str)
        write_atomically(self.path.with_suffix(f".{kind}.json"), text + "\n")


def _jsonable(value: Any) -> Any:
    """Replace non-finite floats by strings, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
