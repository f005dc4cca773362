"""Metrics as JSON lines: one object a line, each with its ``step``.

A number stands as it is, a histogram as ``{"counts": [...], "edges": [...]}`` and a text as
``{"text": "..."}``: objects, so that readers of numbers pass them over.

Numbers that are not finite have no form in JSON; they are written as the strings "NaN",
"Infinity" and "-Infinity", which `float` (and JavaScript's ``Number``) reads back.
"""

import io
import json
import math
import os
import shutil
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from tjx_metrics.atomic import flush_folder, write_atomically
from tjx_metrics.errors import RecordError, RecordWarning
from tjx_metrics.trackers.base import Histogram, Scalar, as_histogram, as_number

_BLOCK = 2**16  # bytes that are read at once
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlTracker:
    """Append metrics to a JSON-lines file, each line handed to the system as it is logged.

    Hyperparameters and summary, which belong to no step, go to ``NAME.hyperparameters.json`` and
    ``NAME.summary.json`` beside the file, each only where it is logged.

    The file never holds part of a line: one that the system takes only in part (the disk is full)
    is taken back.

    Parameters
    ----------
    path : str or Path
        The file, such as ``run/metrics.jsonl``; its folder is made where missing.
    resume_step : int or None
        Step from which the run goes on. Lines of later steps, and a last line that a crash cut
        short, are cut off first, so that no step stands twice; -1 drops all. What is then logged of
        this very step under names that a line of it has already is left out: it stands there.
        None is a new run, for which the file must be missing or empty. Lines must be in the order
        of their steps, as `log` writes them: the file is read from its end. A damaged line that is
        met there is left out with a warning, and the file as it was is kept as ``NAME.damaged``.
    on_error : "stop" or "continue"
        When a line cannot be written: raise, or keep it in memory and write it with a later one.
    max_kept : int
        Lines that are kept in memory at most; beyond, the oldest are lost, which is said.

    Raises
    ------
    ValueError
        When `resume_step` is None and the file has content, or when it is below -1.
    RecordError
        When the file cannot be cut or opened.

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

    Attributes
    ----------
    logged_bytes : int
        Size that the file has once everything that was logged stands in it.
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
        self._kept: deque[bytes] = deque()
        self._max_kept = max_kept
        self._resume_step = resume_step
        self._standing: set[frozenset[str]] = set()  # names of each line of the resumed step
        self._file: io.FileIO | None = None
        self._closing = threading.Lock()
        if resume_step is None:
            if self.path.exists() and self.path.stat().st_size > 0:
                raise ValueError(
                    f"{self.path} already holds metrics: pass resume_step=S to go on after step S "
                    "(-1 to begin anew), or choose another path"
                )
        elif resume_step < -1:
            raise ValueError(f"resume_step={resume_step}: must be at least -1; -1 begins anew")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is not None and self.path.exists():
                self._standing = _cut_back_or_mend(self.path, resume_step)
            self._file = self.path.open("ab", buffering=0)
            self.logged_bytes = os.fstat(self._file.fileno()).st_size
            flush_folder(self.path.parent)  # a new file's name is on the disk only then
        except OSError as error:
            raise RecordError(self.path, error) from error

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
            Steps done when the numbers were taken; not less than that of the line before.

        Raises
        ------
        ValueError
            When a metric is no single number or is called ``step``, or after `finish`.
        RecordError
            When it cannot be written, unless that is not to stop the run.
        """
        self._append(
            {name: _jsonable(as_number(name, value)) for name, value in metrics.items()}, step
        )

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Append one line of histograms; `log` says what is taken and what is raised."""
        checked = {name: as_histogram(name, value) for name, value in histograms.items()}
        self._append(
            {
                name: {"counts": counts.tolist(), "edges": _jsonable(edges.tolist())}
                for name, (counts, edges) in checked.items()
            },
            step,
        )

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Append one line of texts; `log` says what is taken and what is raised."""
        self._append({name: {"text": text} for name, text in texts.items()}, step)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the results to ``NAME.summary.json``; what is no JSON as its text."""
        self._write_beside("summary", summary)

    def flush(self) -> None:
        """Bring what was logged to the disk, so that a power cut does not lose it; thread-safe.

        Raises
        ------
        RecordError
            When it cannot be brought there, unless that is not to stop the run: then it warns.
        """
        with self._closing:
            if self._file is None:
                return  # `finish` has done so
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
        """Bring all lines to the disk and close the file. Twice is once.

        Raises
        ------
        RecordError
            When lines that were kept in memory, or what the system holds, cannot be written.
        """
        with self._closing:
            if self._file is None:
                return
            file, held = self._file, len(self._kept)
            try:
                self._write_kept()
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
            raise ValueError("a metric is called 'step': that name holds the step; rename it")
        line = {"step": int(step)} | values
        if step == self._resume_step and frozenset(line) in self._standing:
            return
        self._kept.append((json.dumps(line, allow_nan=False) + "\n").encode())
        self.logged_bytes += len(self._kept[-1])
        try:
            self._write_kept()
        except OSError as error:
            if self._on_error == "stop":
                self._kept.clear()  # the run ends: it is made again from the last checkpoint
                raise RecordError(self.path, error) from error
            self._warn(error)

    def _write_kept(self) -> None:
        """Write the lines that wait, each whole or not at all, until OSError."""
        assert self._file is not None
        while self._kept:
            size = os.fstat(self._file.fileno()).st_size
            rest = self._kept[0]
            try:
                while rest:  # on a disk that is nearly full a part is written before the error
                    rest = rest[self._file.write(rest) :]
            except OSError:
                os.ftruncate(self._file.fileno(), size)
                raise
            self._kept.popleft()

    def _warn(self, error: OSError) -> None:
        """Say once that lines wait, and each time that one is lost."""
        if len(self._kept) > self._max_kept:
            self._kept.popleft()
            text = f"more than {self._max_kept} lines wait: the oldest is lost"
        elif len(self._kept) == 1:
            text = "lines are kept in memory until they can be"
        else:
            return
        warnings.warn(
            f"{self.path} cannot be written ({error}); {text}", RecordWarning, stacklevel=4
        )

    def _write_beside(self, kind: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(_jsonable(content), allow_nan=False, indent=2, default=str)
        write_atomically(self.path.with_suffix(f".{kind}.json"), (text + "\n").encode())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a metrics file, also one that is being written.

    Parameters
    ----------
    path : str or Path
        A file that `JsonlTracker` wrote. A last line that is not whole is left out; so are damaged
        lines before it, with a `RecordWarning` that names the first.

    Returns
    -------
    list of dict
        One per line, in the file's order; numbers that are not finite are floats again. Histograms
        and texts are dicts, as they stand there.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    ValueError
        When the file has lines, and none is a metrics object; or is no regular file.
    """
    return [
        {name: _restored(value) for name, value in record.items()}
        for record in _records(Path(path))
    ]


def _records(path: Path) -> list[dict[str, Any]]:
    """Parse a file; a torn last line is left out."""
    if path.exists() and not path.is_file():  # a pipe would block, a device never end
        raise ValueError(f"{path}: got no regular file; give a file of metrics")
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        del lines[-1]
    parsed, damaged = [], []
    for number, line in enumerate(lines, start=1):
        if (record := _parse(line)) is not None:
            parsed.append(record)
        elif number < len(lines):
            damaged.append(number)
    if damaged and not parsed:
        raise ValueError(f"{path}, line {damaged[0]}: {_DAMAGED}; give a file of metrics")
    if damaged:
        warnings.warn(
            f"{path}, line {damaged[0]}: {_DAMAGED}; {len(damaged)} such lines are left out",
            RecordWarning,
            stacklevel=3,
        )
    return parsed


_DAMAGED = "got no JSON object with an integer 'step'"


class _DamagedLineError(Exception):
    """A line before the last is no metrics object."""


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return a line as an object with a step; None where it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole else None


def _cut_back_or_mend(path: Path, step: int) -> set[frozenset[str]]:
    """Do as `_cut_back`; leave damaged lines out first where it meets one."""
    try:
        return _cut_back(path, step)
    except _DamagedLineError as error:
        aside = _mend(path)
        warnings.warn(
            f"{path}, {error}: {_DAMAGED}; damaged lines are left out, the file as it was is "
            f"{aside}",
            RecordWarning,
            stacklevel=4,
        )
        return _cut_back(path, step)


def _mend(path: Path) -> Path:
    """Keep a copy of a file under another name, then leave its damaged lines out; return the name.

    A crash at any moment leaves the file as it was or mended.
    """
    aside, number = path.with_name(f"{path.name}.damaged"), 2
    while aside.exists():
        aside = path.with_name(f"{path.name}.damaged.{number}")
        number += 1
    mended = path.with_name(f".{path.name}.mended")
    shutil.copyfile(path, aside)
    with path.open("rb") as old, mended.open("wb") as new:
        new.writelines(line for line in old if line.endswith(b"\n") and _parse(line) is not None)
    for written in (aside, mended):
        with written.open("rb") as file:
            os.fsync(file.fileno())
    mended.replace(path)
    flush_folder(path.parent)
    return aside


def _cut_back(path: Path, step: int) -> set[frozenset[str]]:
    """Cut off the lines of steps after `step`; return the names of each line of `step` itself.

    Reads no more than these lines: a file of any length is cut in the memory of a block. What is
    cut off goes at once, by truncation, which a full disk allows too. A damaged line raises
    `_DamagedLineError`, and nothing is cut.
    """
    standing = set()
    with path.open("r+b") as file:
        size = keep = file.seek(0, os.SEEK_END)
        for begin, line in _lines_from_the_end(file, size):
            whole = line.endswith(b"\n")
            record = _parse(line)
            if record is None and begin + len(line) == size:  # the last one: a crash cut it short
                keep = begin
            elif record is None:
                raise _DamagedLineError(f"byte {begin}")
            elif record["step"] > step or not whole:
                keep = begin
            elif record["step"] == step:
                standing.add(frozenset(record))
            else:
                break
        file.truncate(keep)
        os.fsync(file.fileno())
    return standing


def _lines_from_the_end(file: io.BufferedRandom, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield (place in the file, line with its end), the last line first."""
    tail, begin = b"", size  # what stands at `begin` and is not yet given
    while begin:
        length = min(_BLOCK, begin)
        begin -= length
        file.seek(begin)
        tail = file.read(length) + tail
        place = begin + len(tail)
        tail, *lines = tail.splitlines(keepends=True)
        for line in reversed(lines):
            place -= len(line)
            yield place, line
    if tail:
        yield 0, tail


def _jsonable(value: Any) -> Any:
    """Give what is not finite as a string, at any depth; leave the rest."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _restored(value: Any) -> Any:
    """Give numbers that are not finite as floats again, edges among them; leave texts."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict) and "edges" in value:
        return {**value, "edges": [_restored(edge) for edge in value["edges"]]}
    return value
