"""Index of a prepared set, and the layout of its files.

A prepared set is a folder::

    index.json            all counts, the SHA-256 of every other file, and its own
    tokenizer.json        the tokenizer that made the tokens
    train_00000.bin ...   a header of 64 bytes, then tokens of the training split, uint16 or uint32
    train_starts.bin      position of each document's first token in the split, uint64
    validation_00000.bin ...
    malformed.jsonl       malformed records, if there were any: file, line, reason
    packing_train_1024.npz  packing into rows of 1024 tokens, once it was requested

Numbers are little-endian. All shards of a split but the last hold the same number of tokens;
together they are one stream, ``<eot> document <eot> document <eot>``, so that every token of a
document has a preceding token. Without an end-of-text token the documents follow each other
directly. A shard's header holds the tokenizer's fingerprint and the position of its tokens in the
stream, which identifies a shard of another set without reading its tokens.
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tjx_core import write_atomically
from tjx_data.bounded_io import read_json_object
from tjx_data.corpora.documents import Holdout, SplitName
from tjx_data.prepared.index_validation import validate_index

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
MALFORMED_FILE = "malformed.jsonl"
FORMAT = "tjx-data 2"
MAX_INDEX_BYTES = 16 << 20
"""Largest index that is read; an entry of a shard has about 150 bytes."""

# Magic, bytes per token, padding, position of the first token, tokenizer fingerprint, padding.
SHARD_HEADER = struct.Struct("<8sII Q 32s 8x")
SHARD_MAGIC = b"tjxshard"
HEADER_BYTES = SHARD_HEADER.size


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Name, size and hash of a file in a prepared set.

    Attributes
    ----------
    name : str
        Name in the folder.
    n_bytes : int
        Size in bytes.
    sha256 : str
        Hash of the content.
    """

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SplitIndex:
    """Counts and files of one split.

    Attributes
    ----------
    n_tokens : int
        Length of the stream, end-of-text tokens included.
    n_documents : int
        Number of documents.
    n_text_bytes : int
        Length of their text in UTF-8.
    shards : tuple[FileEntry, ...]
        Files of the stream, in order.
    starts : FileEntry
        File of the position of each document's first token.
    """

    n_tokens: int
    n_documents: int
    n_text_bytes: int
    shards: tuple[FileEntry, ...]
    starts: FileEntry


@dataclass(frozen=True, kw_only=True)
class Index:
    """Metadata of a prepared set.

    Attributes
    ----------
    dtype : str
        Dtype of the tokens, ``uint16`` or ``uint32``.
    shard_tokens : int
        Tokens in every shard but the last of a split.
    vocab_size, eot_id, tokenizer_fingerprint
        Properties of the tokenizer that made the tokens.
    tokenizer : FileEntry
        File of that tokenizer.
    holdout, holdout_fraction
        How the validation split was made.
    n_empty_documents : int
        Documents of white space only, which were left out.
    n_malformed : int
        Malformed records, which were left out.
    malformed : FileEntry or None
        File that lists the first malformed records of each part of the corpus, if there are any.
    source : dict[str, str]
        Description of the corpus.
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
        """Bytes per stored token."""
        return 2 if self.dtype == "uint16" else 4

    def files(self, split: SplitName | None = None) -> list[FileEntry]:
        """List the files of one split or of all, with those shared by all splits.

        Parameters
        ----------
        split : {"train", "validation"}, optional
            None lists the files of both.

        Returns
        -------
        list of FileEntry
            Entries of the index.
        """
        chosen = self.splits.values() if split is None else [self.splits[split]]
        shared = [self.tokenizer, *([] if self.malformed is None else [self.malformed])]
        return shared + [entry for part in chosen for entry in (*part.shards, part.starts)]


def shard_header(*, token_bytes: int, first_token: int, tokenizer_fingerprint: str) -> bytes:
    """Return the 64-byte header of a shard.

    Parameters
    ----------
    token_bytes : int
        Bytes per token, 2 or 4.
    first_token : int
        Position of the shard's first token in the stream.
    tokenizer_fingerprint : str
        Hexadecimal SHA-256.
    """
    fingerprint = bytes.fromhex(tokenizer_fingerprint)
    return SHARD_HEADER.pack(SHARD_MAGIC, token_bytes, 0, first_token, fingerprint)


def write_index(directory: Path, index: Index) -> None:
    """Write the index of a set; call it after all other files are written."""
    content = {"format": FORMAT, **asdict(index)}
    whole = {**content, "sha256": _hash(content)}
    write_atomically(directory / INDEX_FILE, json.dumps(whole, indent=1) + "\n")


def read_index(directory: str | Path) -> Index:
    """Read and validate the index of a prepared set.

    Parameters
    ----------
    directory : str or Path
        The set.

    Returns
    -------
    Index
        The index.

    Raises
    ------
    ValueError
        If the folder holds no prepared set, or the index is damaged, of another format, or
        inconsistent.
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
            f"{file}: got format {str(content.get('format'))[:60]!r}; expected {FORMAT!r}; prepare "
            "the data again"
        )
    if stated != _hash(content):
        raise ValueError(
            f"{file}: damaged (its hash differs from the stated one); prepare the data again"
        )
    del content["format"]
    if problems := validate_index(content, HEADER_BYTES):
        raise ValueError("\n".join([f"{file}: invalid; prepare the data again:", *problems[:20]]))
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
