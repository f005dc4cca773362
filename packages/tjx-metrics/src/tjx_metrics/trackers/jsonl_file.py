"""Reading, truncation and repair of metrics files, as `JsonlTracker` writes them."""

import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tjx_core import fsync_path
from tjx_metrics.errors import RecordWarning

_BLOCK = 2**16  # bytes per read
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a metrics file, even while it is being written.

    Parameters
    ----------
    path : str or Path
        A file written by `JsonlTracker`. An incomplete last line is skipped; so are damaged lines
        before it, with a `RecordWarning` that names the first.

    Returns
    -------
    list of dict
        One record per line, in the order of the file. Non-finite numbers are floats; histograms
        and texts are dicts.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the file has lines but no valid record, or is not a regular file.
    """
    return [
        {name: _restored(value) for name, value in record.items()}
        for record in _records(Path(path))
    ]


def _records(path: Path) -> list[dict[str, Any]]:
    if path.exists() and not path.is_file():  # reading a pipe or a device could block
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
            f"{path}, line {damaged[0]}: {_DAMAGED}; skipped {len(damaged)} such lines",
            RecordWarning,
            stacklevel=3,
        )
    return parsed


_DAMAGED = "got no JSON object with an integer 'step'"


class _DamagedLineError(Exception):
    """Raised for a line before the last that is not a metrics record."""


def _parse(line: bytes) -> dict[str, Any] | None:
    """Parse a line; None if it is not an object with an integer step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # invalid JSON or UTF-8, or nested too deeply
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if is_record else None


def truncate_or_repair(path: Path, step: int) -> set[frozenset[str]]:
    """Truncate a file with `_truncate_after`, repairing it first if it has a damaged line."""
    try:
        return _truncate_after(path, step)
    except _DamagedLineError as error:
        backup = _remove_damaged_lines(path)
        warnings.warn(
            f"{path}, {error}: {_DAMAGED}; damaged lines are removed, the original file is "
            f"{backup}",
            RecordWarning,
            stacklevel=4,
        )
        return _truncate_after(path, step)


def _remove_damaged_lines(path: Path) -> Path:
    """Back up a file, then remove its damaged lines atomically; return the path of the backup."""
    backup, number = path.with_name(f"{path.name}.damaged"), 2
    while backup.exists():
        backup = path.with_name(f"{path.name}.damaged.{number}")
        number += 1
    repaired = path.with_name(f".{path.name}.mended")
    shutil.copyfile(path, backup)
    with path.open("rb") as old, repaired.open("wb") as new:
        new.writelines(line for line in old if line.endswith(b"\n") and _parse(line) is not None)
    for written in (backup, repaired):
        with written.open("rb") as file:
            os.fsync(file.fileno())
    repaired.replace(path)
    fsync_path(path.parent)
    return backup


def _truncate_after(path: Path, step: int) -> set[frozenset[str]]:
    """Remove the lines of steps after `step`; return the names in each line of `step` itself.

    Reads from the end and only these lines, so memory use is independent of the file size.
    Truncation is atomic and works on a full disk. A damaged line raises `_DamagedLineError` before
    anything is removed.
    """
    recorded = set()
    with path.open("r+b") as file:
        size = keep = file.seek(0, os.SEEK_END)
        for start, line in _reversed_lines(file, size):
            is_complete = line.endswith(b"\n")
            record = _parse(line)
            if record is None and start + len(line) == size:  # incomplete last line
                keep = start
            elif record is None:
                raise _DamagedLineError(f"byte {start}")
            elif record["step"] > step or not is_complete:
                keep = start
            elif record["step"] == step:
                recorded.add(frozenset(record))
            else:
                break
        file.truncate(keep)
        os.fsync(file.fileno())
    return recorded


def _reversed_lines(file: io.BufferedRandom, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, line including its newline), starting with the last line."""
    tail, begin = b"", size  # unconsumed bytes at offset `begin`
    while begin:
        length = min(_BLOCK, begin)
        begin -= length
        file.seek(begin)
        tail = file.read(length) + tail
        offset = begin + len(tail)
        tail, *lines = tail.splitlines(keepends=True)
        for line in reversed(lines):
            offset -= len(line)
            yield offset, line
    if tail:
        yield 0, tail


def _restored(value: Any) -> Any:
    """Convert strings of non-finite numbers to floats, also in histogram edges; keep texts."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict) and "edges" in value:
        return {**value, "edges": [_restored(edge) for edge in value["edges"]]}
    return value
