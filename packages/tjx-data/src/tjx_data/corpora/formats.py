"""File formats by name, and decoding of text and JSON lines into documents."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from tjx_data.corpora.decompression import Compression
from tjx_data.corpora.documents import Malformed
from tjx_data.corpora.text_template import record_text, type_name

SEPARATOR = "<|endoftext|>"
SEPARATOR_BYTES = SEPARATOR.encode()

BEGINS_ARRAY = "begins an array that does not end in its line"

Kind = Literal["text", "JSON lines", "Parquet", "Arrow", "tar"]

_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_KINDS: dict[str, Kind] = {
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON lines",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".tar": "tar",
}
_TEXT_SUFFIXES = (".txt", ".md")


class Format(NamedTuple):
    """Content and compression of a file."""

    kind: Kind
    compression: Compression

    @property
    def can_be_cut(self) -> bool:
        """Whether byte ranges of the file can be read independently."""
        return self.compression == "none" and self.kind in ("text", "JSON lines")


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


def is_corpus_file(file: Path) -> bool:
    """Return whether a file of a folder is read: whether its suffix is that of a format."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in (*_KINDS, *_TEXT_SUFFIXES)


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
        Text of a record, as of `record_fields`.
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
        raise ValueError(f"holds {type_name(record)}, not an object")
    return record_text(record, text_field)
