"""What a file holds, by its name, and how the bytes of text and JSON lines become documents."""

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
    """What a file holds, and how it is packed."""

    kind: Kind
    compression: Compression

    @property
    def can_be_cut(self) -> bool:
        """Whether stretches of the file can be read by themselves."""
        return self.compression == "none"


def format_of(file: Path) -> Format:
    """Tell what a file holds by the end of its name; text if that says nothing else.

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
    """Yield the documents of a text, where `SEPARATOR` stands between them.

    Newlines beside a separator belong to it. A text without any is one document.

    Parameters
    ----------
    blocks : Iterable[bytes]
        The text in UTF-8, cut anywhere.
    after_separator : bool
        Whether the text begins right after a separator.
    """
    pieces: list[bytes] = []  # of the document being read
    carry = b""  # the end of a block may hold the beginning of a separator
    for block in blocks:
        *whole, rest = (carry + block).split(SEPARATOR_BYTES)
        for piece in whole:
            text = b"".join([*pieces, piece])
            yield (text.lstrip(b"\n") if after_separator else text).rstrip(b"\n").decode()
            pieces, after_separator = [], True
        n_safe = max(0, len(rest) - len(SEPARATOR_BYTES) + 1)
        pieces.append(rest[:n_safe])
        carry = rest[n_safe:]
    text = b"".join([*pieces, carry])
    if after_separator:
        text = text.lstrip(b"\n")
    if text or not after_separator:
        yield text.decode()


def split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines without their ends, of bytes that are cut anywhere."""
    pieces: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        pieces.append(first)
        for following in others:
            yield b"".join(pieces)
            pieces = [following]
    if last := b"".join(pieces):
        yield last


def texts_of_records(
    lines: Iterable[bytes], text_field: str, file: str, first_line: int
) -> Iterator[str | Malformed]:
    """Yield the text of each JSON line; lines of white space are passed over.

    Parameters
    ----------
    lines : Iterable[bytes]
        The lines.
    text_field : str
        Where the text is in a record.
    file : str
        The file, for what is malformed.
    first_line : int
        The number of the first line in the file; 1 is the first.
    """
    for number, line in enumerate(lines, first_line):
        if not line.strip():
            continue
        try:
            text: str | Malformed = _text_of(line, text_field)
        except ValueError as error:
            text = Malformed(file, number, str(error))
        yield text


def _text_of(line: bytes, text_field: str) -> str:
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
        raise ValueError(f"has no field {text_field!r}; there are {', '.join(record) or 'none'}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} holds {_TYPES[type(text)]}, not a string")
    if not is_unicode(text):
        raise ValueError(f"field {text_field!r} holds half a character (a lone surrogate)")
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


def is_unicode(text: str) -> bool:
    r"""Tell whether a text can be written as UTF-8; JSON can hold halves such as ``"\ud800"``."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
