"""What a prepared data set holds: the index beside its shards.

A prepared set is a folder::

    index.json            all counts and the SHA-256 of every other file, and of itself
    tokenizer.json        the tokenizer that made the tokens
    train_00000.bin ...   a header of 64 bytes, then tokens of the training split, uint16 or uint32
    train_starts.bin      where each document starts in the split, uint64
    validation_00000.bin ...
    malformed.jsonl       records that held no document, if there were any: file, line, reason
    packing_train_1024.npz  which documents share a row of 1024 tokens, where that was asked for

Numbers are little-endian. All shards of a split but the last hold the same number of tokens;
together they are one stream, ``<eot> document <eot> document <eot>``, so that every token of a
document is predicted from something. Without an end-of-text token the documents follow each other
directly. A shard's header holds the tokenizer's fingerprint and where its tokens stand in the
stream: a shard from another set is known without reading it.
"""

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tjx_data.atomic import write_atomically
from tjx_data.bounded_io import read_json_object
from tjx_data.corpora.documents import Holdout, SplitName
from tjx_data.errors import DataError
from tjx_data.prepared.index_validation import validate_index

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
MALFORMED_FILE = "malformed.jsonl"
FORMAT = "tjx-data 2"
MAX_INDEX_BYTES = 16 << 20  # bytes; an entry for each shard has about 150

# Magic, bytes of a token, nothing, first token's position in the stream, tokenizer's fingerprint.
_HEADER = struct.Struct("<8sII Q 32s 8x")
_MAGIC = b"tjxshard"
HEADER_BYTES = _HEADER.size


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
    n_malformed : int
        Records that held no document and were left out.
    malformed : FileEntry or None
        Where they lie, if there were any: the first of each part of the corpus.
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
    n_malformed: int
    malformed: FileEntry | None
    source: dict[str, str]
    splits: dict[SplitName, SplitIndex]

    @property
    def token_bytes(self) -> int:
        """Bytes of a stored token."""
        return 2 if self.dtype == "uint16" else 4

    def files(self, split: SplitName | None = None) -> list[FileEntry]:
        """List the files of one split, or of all, with those that the whole set shares."""
        chosen = self.splits.values() if split is None else [self.splits[split]]
        shared = [self.tokenizer, *([] if self.malformed is None else [self.malformed])]
        return shared + [entry for part in chosen for entry in (*part.shards, part.starts)]


def shard_header(*, token_bytes: int, first_token: int, tokenizer_fingerprint: str) -> bytes:
    """Return the 64 bytes that a shard begins with."""
    fingerprint = bytes.fromhex(tokenizer_fingerprint)
    return _HEADER.pack(_MAGIC, token_bytes, 0, first_token, fingerprint)


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
        If the folder holds no prepared set, the index was changed after it was written, it is of a
        format that this version does not read, or says what cannot be.
    """
    file = Path(directory) / INDEX_FILE
    try:
        content = read_json_object(file, MAX_INDEX_BYTES)
        stated = content.pop("sha256")
    except FileNotFoundError as error:
        raise ValueError(
            f"{directory}: no prepared data here ({INDEX_FILE} is missing); make it with "
            "tjx-data prepare"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file}: damaged ({error}); prepare the data again") from error
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{file}: format {str(content.get('format'))[:60]!r}, but this version reads "
            f"{FORMAT!r}; prepare the data again"
        )
    if stated != _hash(content):
        raise ValueError(f"{file}: damaged (it does not have the hash it states); prepare again")
    del content["format"]
    if problems := validate_index(content, HEADER_BYTES):
        raise ValueError(
            "\n".join([f"{file}: says what cannot be; prepare the data again:", *problems[:20]])
        )
    splits = {name: _split_index(split) for name, split in content.pop("splits").items()}
    tokenizer = FileEntry(**content.pop("tokenizer"))
    malformed = content.pop("malformed")
    return Index(
        splits=splits,
        tokenizer=tokenizer,
        malformed=None if malformed is None else FileEntry(**malformed),
        **content,
    )


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
    DataError
        Naming the file.
    """
    file = directory / entry.name
    try:
        found = file.stat().st_size
        is_regular = file.is_file()  # a pipe would keep its reader waiting
    except FileNotFoundError as error:
        raise DataError(f"{file}: missing, though the index lists it; prepare again") from error
    except OSError as error:
        raise DataError(_unreadable(file, error)) from error
    if found != entry.n_bytes or not is_regular:
        raise DataError(
            f"{file}: has {found} bytes, the index says {entry.n_bytes}; it is truncated or from "
            "another set; prepare the data again"
        )


def check_shard(directory: Path, index: Index, split: SplitName, number: int) -> None:
    """Refuse a shard that is missing, truncated, or not the one that belongs in this place.

    Raises
    ------
    DataError
        Naming the file.
    """
    entry = index.splits[split].shards[number]
    check_size(directory, entry)
    file = directory / entry.name
    expected = shard_header(
        token_bytes=index.token_bytes,
        first_token=number * index.shard_tokens,
        tokenizer_fingerprint=index.tokenizer_fingerprint,
    )
    try:
        with file.open("rb") as stream:
            found = stream.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(_unreadable(file, error)) from error
    if found == expected:
        return
    magic, _, _, _, fingerprint = _HEADER.unpack(found)
    if magic != _MAGIC:
        raise DataError(f"{file}: not a shard of tokens (its header is another); prepare again")
    if fingerprint.hex() != index.tokenizer_fingerprint:
        raise DataError(
            f"{file}: its tokens were made with tokenizer {fingerprint.hex()[:16]}, those of the "
            f"set with {index.tokenizer_fingerprint[:16]}; prepare the data again"
        )
    raise DataError(f"{file}: belongs to another place or set (its header says so); prepare again")


def check_hashes(directory: Path, entries: list[FileEntry]) -> None:
    """Read files, on all cores, and refuse the first whose content is not what the index says."""
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        for _ in threads.map(lambda entry: check_hash(directory, entry), entries):
            pass


def check_hash(directory: Path, entry: FileEntry) -> None:
    """Refuse a file whose content is not what the index says.

    Raises
    ------
    DataError
        Naming the file.
    """
    check_size(directory, entry)
    file = directory / entry.name
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(_unreadable(file, error)) from error
    if found != entry.sha256:
        raise DataError(
            f"{file}: SHA-256 is {found}, the index says {entry.sha256}; the file is damaged or "
            "from another set; prepare the data again"
        )


def _unreadable(file: Path, error: OSError) -> str:
    return f"{file}: cannot be read ({error.strerror}); is it ours to read, and its disk there?"
