"""What a prepared data set holds: the index beside its shards.

A prepared set is a folder::

    index.json            all counts and the SHA-256 of every other file, and of itself
    tokenizer.json        the tokenizer that made the tokens
    train_00000.bin ...   tokens of the training split, uint16 or uint32, little-endian
    train_starts.bin      where each document starts in the split, uint64, little-endian
    validation_00000.bin ...

All shards of a split but the last hold the same number of tokens; together they are one stream,
``<eot> document <eot> document <eot>``, so that every token of a document is predicted from
something. Without an end-of-text token the documents follow each other directly.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tjx_data.atomic import write_atomically
from tjx_data.documents import Holdout, SplitName

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = "tjx-data 1"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of a prepared set.

    Attributes
    ----------
    name : str
        Its name in the folder.
    n_bytes : int
        Its size.
    sha256 : str
        The hash of its content.
    """

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SplitIndex:
    """One split of a prepared set.

    Attributes
    ----------
    n_tokens : int
        Length of the stream, end-of-text tokens included.
    n_documents : int
        Documents in it.
    n_text_bytes : int
        Length of their text in UTF-8.
    shards : tuple[FileEntry, ...]
        The stream, in order.
    starts : FileEntry
        Position of each document's first token in the stream.
    """

    n_tokens: int
    n_documents: int
    n_text_bytes: int
    shards: tuple[FileEntry, ...]
    starts: FileEntry


@dataclass(frozen=True, kw_only=True)
class Index:
    """All that is known about a prepared set.

    Attributes
    ----------
    dtype : str
        ``uint16`` or ``uint32``.
    shard_tokens : int
        Tokens in every shard but the last of a split.
    vocab_size, eot_id, tokenizer_fingerprint
        Of the tokenizer that made the tokens.
    tokenizer : FileEntry
        The tokenizer itself.
    holdout, holdout_fraction
        How validation was split off.
    n_empty_documents : int
        Documents that held nothing but white space and were left out.
    source : dict[str, str]
        Where the text comes from.
    splits : dict[str, SplitIndex]
        ``train`` and ``validation``.
    """

    dtype: str
    shard_tokens: int
    vocab_size: int
    eot_id: int | None
    tokenizer_fingerprint: str
    tokenizer: FileEntry
    holdout: Holdout
    holdout_fraction: float
    n_empty_documents: int
    source: dict[str, str]
    splits: dict[SplitName, SplitIndex]


def write_index(directory: Path, index: Index) -> None:
    """Write the index of a set; it is the last file of a set to be written."""
    content = {"format": FORMAT, **asdict(index)}
    whole = {**content, "sha256": _hash(content)}
    write_atomically(directory / INDEX_FILE, (json.dumps(whole, indent=1) + "\n").encode("utf-8"))


def read_index(directory: str | Path) -> Index:
    """Read and check the index of a prepared set.

    Raises
    ------
    ValueError
        If the folder holds no prepared set, the index was changed after it was written, or it is
        of a format that this version does not read.
    """
    file = Path(directory) / INDEX_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        stated = content.pop("sha256")
    except FileNotFoundError as error:
        raise ValueError(
            f"{directory}: no prepared data here ({INDEX_FILE} is missing); make it with "
            "tjx-data prepare"
        ) from error
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error}); prepare the data again") from error
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{file}: format {content.get('format')!r}, but this version reads {FORMAT!r}; prepare "
            "the data again"
        )
    if stated != _hash(content):
        raise ValueError(f"{file}: damaged (it does not have the hash it states); prepare again")
    del content["format"]
    splits = {name: _split_index(split) for name, split in content.pop("splits").items()}
    tokenizer = FileEntry(**content.pop("tokenizer"))
    return Index(splits=splits, tokenizer=tokenizer, **content)


def _split_index(fields: dict[str, Any]) -> SplitIndex:
    shards = tuple(FileEntry(**shard) for shard in fields.pop("shards"))
    return SplitIndex(shards=shards, starts=FileEntry(**fields.pop("starts")), **fields)


def _hash(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def check_size(directory: Path, entry: FileEntry) -> None:
    """Refuse a file that is missing or has another size than the index says.

    Raises
    ------
    ValueError
        Naming the file.
    """
    file = directory / entry.name
    try:
        found = file.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{file}: missing, though the index lists it; prepare again") from error
    if found != entry.n_bytes:
        raise ValueError(
            f"{file}: has {found} bytes, the index says {entry.n_bytes}; it is truncated or from "
            "another set; prepare the data again"
        )


def check_hash(directory: Path, entry: FileEntry) -> None:
    """Refuse a file whose content is not what the index says.

    Raises
    ------
    ValueError
        Naming the file.
    """
    check_size(directory, entry)
    file = directory / entry.name
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != entry.sha256:
        raise ValueError(
            f"{file}: SHA-256 is {found}, the index says {entry.sha256}; the file is damaged or "
            "from another set; prepare the data again"
        )
