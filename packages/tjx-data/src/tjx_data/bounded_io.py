"""Reading of untrusted files within limits that are checked before memory is allocated."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

# Text compresses to about a tenth and logs to a hundredth of their size; bombs far more.
MAX_UNPACK_RATIO = 200
"""Most unpacked bytes for each packed byte."""
MIN_UNPACK_LIMIT_BYTES = 64 << 20
"""Bytes that any file may unpack to, however small."""


def read_bounded(file: Path, limit: int) -> bytes:
    """Read a whole file of limited size.

    Parameters
    ----------
    file : Path
        A regular file; reading a pipe could block.
    limit : int
        Largest allowed size in bytes.

    Raises
    ------
    ValueError
        If the file is larger, or not a regular file.
    OSError
        If it is missing or unreadable.
    """
    size = file.stat().st_size
    if not file.is_file():
        raise ValueError(f"{file}: not a regular file")
    if size > limit:
        raise ValueError(
            f"{file}: got {size} bytes; expected at most {limit} for this kind of file"
        )
    with file.open("rb") as stream:
        return stream.read(limit)


def read_json_object(file: Path, limit: int) -> dict[str, Any]:
    """Read a file that holds a strict JSON object.

    Parameters
    ----------
    file : Path
        A regular file.
    limit : int
        Largest allowed size in bytes.

    Raises
    ------
    ValueError
        If it is larger, not an object, or rejected by `parse_json`.
    OSError
        If it is missing or unreadable.
    """
    content = parse_json(read_bounded(file, limit))
    if not isinstance(content, dict):
        raise ValueError(f"got a JSON {type(content).__name__}; expected an object")
    return content


def parse_json(text: bytes) -> Any:
    """Parse JSON without the leniency of `json.loads`.

    Parameters
    ----------
    text : bytes
        JSON in UTF-8.

    Returns
    -------
    object
        The value.

    Raises
    ------
    ValueError
        If the text is not UTF-8 or not JSON, is nested too deeply, has a number of thousands of
        digits, repeats a key in an object (parsers disagree on which value counts), or contains NaN
        or Infinity.
    """
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_reject_constant,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((repeated, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"repeats the key {repeated[:60]!r}")
    return found


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check_unpacked(file: Path, n_unpacked: int, n_packed: int) -> None:
    """Check that a compressed file is not a decompression bomb.

    Parameters
    ----------
    file : Path
        The file, for the message.
    n_unpacked : int
        Unpacked size in bytes that it claims, or that was unpacked so far.
    n_packed : int
        Size of the file in bytes.

    Raises
    ------
    ValueError
        If the unpacked size exceeds `MAX_UNPACK_RATIO` times the packed size and
        `MIN_UNPACK_LIMIT_BYTES`.
    """
    allowed = max(MIN_UNPACK_LIMIT_BYTES, MAX_UNPACK_RATIO * n_packed)
    if n_unpacked > allowed:
        raise ValueError(
            f"{file}: got at least {n_unpacked} bytes unpacked from {n_packed}; expected at most "
            f"{allowed}; it may be a decompression bomb; if you trust it, unpack it yourself"
        )
