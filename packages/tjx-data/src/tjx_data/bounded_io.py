"""What a stranger's file may make this program hold in memory, decided before it is held.

A file that is read whole may be as large as its kind ever is. A packed one may unpack to a multiple
of its size: a few kilobytes that unpack to a disk full of zeros are a decompression bomb.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

# Real text packs to a tenth, logs to a hundredth; bombs to a thousandth and far beyond.
MAX_UNPACK_RATIO = 200  # bytes for each packed one
MIN_UNPACK_LIMIT_BYTES = 64 << 20  # bytes that anything may unpack to


def read_bounded(file: Path, limit: int) -> bytes:
    """Read a file whole.

    Parameters
    ----------
    file : Path
        A regular file: a pipe would keep the reader waiting.
    limit : int
        Bytes that it may have.

    Raises
    ------
    ValueError
        If it is larger, or no regular file.
    OSError
        If it is missing or cannot be read.
    """
    size = file.stat().st_size
    if not file.is_file():
        raise ValueError(f"{file}: not a regular file; give one")
    if size > limit:
        raise ValueError(
            f"{file}: has {size} bytes, and such a file has {limit} at most; is it another one?"
        )
    with file.open("rb") as stream:
        return stream.read(limit)


def read_json_object(file: Path, limit: int) -> dict[str, Any]:
    """Read a file that holds a JSON object, as strictly as we write them.

    Raises
    ------
    ValueError
        If it is too large, no JSON, no object, nested too deeply, holds a key twice (two readers
        could take different ones), or NaN or Infinity.
    OSError
        If it is missing or cannot be read.
    """
    content = parse_json(read_bounded(file, limit))
    if not isinstance(content, dict):
        raise ValueError(f"holds no object but a {type(content).__name__}")
    return content


def parse_json(text: bytes) -> Any:
    """Return what JSON says, read as strictly as we write it.

    Raises
    ------
    ValueError
        If it is no JSON in UTF-8, is nested too deeply, has a number of thousands of digits, holds
        a key twice (two readers could take different ones), or NaN or Infinity.
    """
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_without_repetition,
            parse_constant=_refuse_constant,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:60]!r} stands there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def check_unpacked(file: Path, n_unpacked: int, n_packed: int) -> None:
    """Refuse what unpacks to more than text, tokens or images ever do.

    Parameters
    ----------
    file : Path
        The file, for the message.
    n_unpacked : int
        Bytes that it claims to hold, or that were unpacked so far.
    n_packed : int
        Bytes of the file.

    Raises
    ------
    ValueError
        Telling what is allowed.
    """
    allowed = max(MIN_UNPACK_LIMIT_BYTES, MAX_UNPACK_RATIO * n_packed)
    if n_unpacked > allowed:
        raise ValueError(
            f"{file}: its {n_packed} bytes unpack to {n_unpacked} or more, and {allowed} are "
            "allowed: it may be a decompression bomb; if you trust it, unpack it yourself"
        )
