"""Reading of conversations and preference pairs from JSON files, with malformed records listed."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tjx_core import ConfigError
from tjx_data.bounded_io import parse_json, read_bounded
from tjx_data.conversations.config import ChatConfig
from tjx_data.conversations.records import (
    Conversation,
    PreferencePair,
    parse_conversation,
    parse_preference,
)
from tjx_data.corpora.decompression import read_blocks
from tjx_data.corpora.documents import Malformed
from tjx_data.corpora.files import Paths, find_files
from tjx_data.corpora.formats import format_of, split_lines

_log = logging.getLogger(__name__)

MAX_RECORD_BYTES = 16 << 20
"""Largest record that is parsed."""
MAX_ARRAY_BYTES = 1 << 30
"""Largest file that holds one JSON array."""
MAX_LISTED = 20
"""Malformed records that an error or a warning lists."""


class Record(NamedTuple):
    """A JSON value of a file, or the reason why it cannot be parsed.

    Attributes
    ----------
    file : str
        The file.
    line : int
        Line in the file, or number of the element of a JSON array, from 1.
    value : object
        The value.
    """

    file: str
    line: int
    value: Any


def read_records(path: Paths) -> Iterator[Record | Malformed]:
    """Yield the records of JSON lines files, or of files that hold one JSON array.

    Parameters
    ----------
    path : str, Path or sequence of them
        A file, a pattern such as ``"chats/*.jsonl"``, or several, also separated by commas; JSON
        lines may have ``.gz`` or ``.zst`` appended.

    Yields
    ------
    Record or Malformed
        A record with its location, or why a line is none.

    Raises
    ------
    ValueError
        If no file matches, or a file is unreadable or damaged.
    """
    for file in find_files(path):
        form = format_of(file)
        if form.kind != "JSON lines":
            raise ValueError(
                f"{file}: got a file of {form.kind}; expected .jsonl, .ndjson or .json; convert it"
            )
        if form.compression == "none" and _begins_array(file):
            yield from _read_array(file)
            continue
        lines = split_lines(read_blocks(file, form.compression))
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse(str(file), number, line)


def read_conversations(
    path: Paths, config: ChatConfig | None = None
) -> tuple[list[Conversation], list[Malformed]]:
    """Read conversations for supervised fine-tuning.

    Parameters
    ----------
    path : str, Path or sequence of them
        As of `read_records`.
    config : ChatConfig, optional
        `format`, `skip_malformed` and `ignore_keys` are used.

    Returns
    -------
    list of Conversation, and list of Malformed
        The second is empty without `skip_malformed`.

    Raises
    ------
    ValueError
        If a record is malformed (the first ones are listed with file and line) and
        `skip_malformed` is false; or there is no conversation.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "chat.jsonl")
    ...     _ = file.write_text('{"prompt": "1 + 2 =", "completion": "3"}')
    ...     conversations, malformed = read_conversations(file)
    >>> len(conversations), len(malformed)
    (1, 0)
    """
    config = config or ChatConfig()

    def parse(value: Any, location: str) -> Conversation:
        return parse_conversation(value, config.format, ignored=config.ignored, location=location)

    return _read(path, config, parse)


def read_preferences(
    path: Paths, config: ChatConfig | None = None
) -> tuple[list[PreferencePair], list[Malformed]]:
    """Read preference pairs: records with "chosen" and "rejected".

    Parameters
    ----------
    path, config
        As for `read_conversations`, as are the result and the errors.

    Returns
    -------
    pairs : list of PreferencePair
        The pairs, in the order of the files.
    malformed : list of Malformed
        Records that were left out, with file and line.
    """
    config = config or ChatConfig()

    def parse(value: Any, location: str) -> PreferencePair:
        return parse_preference(value, ignored=config.ignored, location=location)

    return _read(path, config, parse)


def _read[T](
    path: Paths, config: ChatConfig, parse: Callable[[Any, str], T]
) -> tuple[list[T], list[Malformed]]:
    found: list[T] = []
    malformed: list[Malformed] = []
    for record in read_records(path):
        if isinstance(record, Malformed):
            malformed.append(record)
            continue
        try:
            found.append(parse(record.value, f"{record.file}:{record.line}"))
        except ValueError as error:
            malformed.append(Malformed(record.file, record.line, str(error)))
    report_malformed(malformed, len(found), skip=config.skip_malformed)
    if not found:
        raise ValueError(f"path: got {path}, which holds no conversation; expected at least one")
    return found, malformed


def report_malformed(malformed: Sequence[Malformed], n_sound: int, *, skip: bool) -> None:
    """Log malformed records if they are skipped, else raise ValueError with the first ones.

    Parameters
    ----------
    malformed : sequence of Malformed
        Records that cannot be used.
    n_sound : int
        Number of the other records.
    skip : bool
        Whether malformed records are skipped.
    """
    if not malformed:
        return
    lines = [f"{each.file}:{each.line}: {each.reason}" for each in malformed[:MAX_LISTED]]
    if len(malformed) > MAX_LISTED:
        lines.append(f"and {len(malformed) - MAX_LISTED:,} more")
    if not skip:
        lines.append(
            f"{len(malformed):,} of {len(malformed) + n_sound:,} records are malformed; correct "
            "them, or skip them with skip_malformed"
        )
        raise ConfigError(lines)
    _log.warning("skipped %d malformed records:\n%s", len(malformed), "\n".join(lines))


def _begins_array(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(1 << 12).lstrip().startswith(b"[")


def _read_array(file: Path) -> Iterator[Record | Malformed]:
    try:
        values = parse_json(read_bounded(file, MAX_ARRAY_BYTES))
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON array: {error}") from error
    for number, value in enumerate(values, start=1):
        yield Record(str(file), number, value)


def _parse(file: str, number: int, line: bytes) -> Record | Malformed:
    if len(line) > MAX_RECORD_BYTES:
        return Malformed(file, number, f"has {len(line)} bytes; expected {MAX_RECORD_BYTES}")
    try:
        return Record(file, number, parse_json(line))
    except ValueError as error:
        return Malformed(file, number, f"not JSON: {error}")
