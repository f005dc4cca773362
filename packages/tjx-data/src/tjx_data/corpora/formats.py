"""File formats by name, and decoding of text and JSON lines into documents."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from tjx_data.corpora.decompression import Compression
from tjx_data.corpora.documents import Malformed

SEPARATOR = "<|endoftext|>"
SEPARATOR_BYTES = SEPARATOR.encode()

BEGINS_ARRAY = "begins an array that does not end in its line"

Kind = Literal["text", "JSON lines", "Parquet"]

_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_KINDS: dict[str, Kind] = {
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON lines",
    ".parquet": "Parquet",
}


class Format(NamedTuple):
    """Content and compression of a file."""

    kind: Kind
    compression: Compression

    @property
    def can_be_cut(self) -> bool:
        """Whether byte ranges of the file can be read independently."""
        return self.compression == "none"


def format_of(file: Path) -> Format:
    """Return the format of a file by its name; text for unknown suffixes.

    Examples
    --------
    >>> format_of(Path("crawl-001.jsonl.zst"))
    Format(kind='JSON lines', compression='zstd')
    """
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    compression: Compression = "none"
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        compression = _COMPRESSIONS[suffixes.pop()]
    return Format(_KINDS.get(suffixes[-1], "text") if suffixes else "text", compression)


def split_at_separators(blocks: Iterable[bytes], *, after_separator: bool) -> Iterator[str]:
    """Yield the documents of a text that are separated by `SEPARATOR`.

    Newlines next to a separator belong to it. A text without a separator is one document.

    Parameters
    ----------
    blocks : Iterable[bytes]
        UTF-8 text, cut at any byte.
    after_separator : bool
        Whether the text starts right after a separator.
    """
    parts: list[bytes] = []  # of the current document
    carry = b""  # the end of a block may hold the start of a separator
    for block in blocks:
        *complete, rest = (carry + block).split(SEPARATOR_BYTES)
        for part in complete:
            text = b"".join([*parts, part])
            yield (text.lstrip(b"\n") if after_separator else text).rstrip(b"\n").decode()
            parts, after_separator = [], True
        n_safe = max(0, len(rest) - len(SEPARATOR_BYTES) + 1)
        parts.append(rest[:n_safe])
        carry = rest[n_safe:]
    text = b"".join([*parts, carry])
    if after_separator:
        text = text.lstrip(b"\n")
    if text or not after_separator:
        yield text.decode()


def split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines, without their newlines, from bytes that are cut at any position."""
    parts: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        parts.append(first)
        for following in others:
            yield b"".join(parts)
            parts = [following]
    if last := b"".join(parts):
        yield last


def texts_of_records(
    lines: Iterable[bytes], text_field: str, file: str, first_line: int
) -> Iterator[str | Malformed]:
    """Yield the text of each JSON line; lines of white space are skipped.

    Parameters
    ----------
    lines : Iterable[bytes]
        The lines.
    text_field : str
        Field of the text.
    file : str
        File name in malformed records.
    first_line : int
        Number of the first line in the file, from 1.
    """
    for number, line in enumerate(lines, first_line):
        if not line.strip():
            continue
        try:
            text: str | Malformed = _parse_record(line, text_field)
        except ValueError as error:
            text = Malformed(file, number, str(error))
        yield text


def _parse_record(line: bytes, text_field: str) -> str:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from error
    except (ValueError, RecursionError) as error:
        reason = BEGINS_ARRAY if line.lstrip().startswith(b"[") else f"not JSON: {error}"
        raise ValueError(reason) from error
    if not isinstance(record, dict):
        raise ValueError(f"holds {_TYPES[type(record)]}, not an object")
    if text_field not in record:
        raise ValueError(f"has no field {text_field!r}; it has {', '.join(record) or 'none'}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} holds {_TYPES[type(text)]}, not a string")
    if not _is_unicode(text):
        raise ValueError(f"field {text_field!r} holds a lone surrogate")
    return text


_TYPES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _is_unicode(text: str) -> bool:
    r"""Return whether a string has UTF-8; JSON can hold lone surrogates such as ``"\ud800"``."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
