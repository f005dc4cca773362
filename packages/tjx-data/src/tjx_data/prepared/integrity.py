"""Integrity checks of the files of a prepared set against its index."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.documents import SplitName
from tjx_data.errors import DataError
from tjx_data.prepared.index import (
    HEADER_BYTES,
    SHARD_HEADER,
    SHARD_MAGIC,
    FileEntry,
    Index,
    shard_header,
)

PREPARE_AGAIN = "prepare the data again"


def check_size(directory: Path, entry: FileEntry, *, fix: str = PREPARE_AGAIN) -> None:
    """Check that a file exists, is regular and has its recorded size.

    Parameters
    ----------
    directory : Path
        Folder of the file.
    entry : FileEntry
        Its name, size and hash.
    fix : str
        What the user can do, for the message.

    Raises
    ------
    DataError
        If not; the message names the file.
    """
    file = directory / entry.name
    try:
        found = file.stat().st_size
        is_regular = file.is_file()  # reading a pipe would block
    except FileNotFoundError as error:
        raise DataError(f"{file}: missing; {fix}") from error
    except OSError as error:
        raise DataError(_unreadable(file, error)) from error
    if found != entry.n_bytes or not is_regular:
        raise DataError(
            f"{file}: got {found} bytes; expected {entry.n_bytes} as recorded; it is truncated or "
            f"from another set; {fix}"
        )


def check_shard(directory: Path, index: Index, split: SplitName, number: int) -> None:
    """Check the size and header of a shard, without reading its tokens.

    Parameters
    ----------
    directory : Path
        The set.
    index : Index
        Its index.
    split : {"train", "validation"}
        Split of the shard.
    number : int
        Number of the shard in the split, from 0.

    Raises
    ------
    DataError
        If it is missing, truncated, made by another tokenizer, or belongs to another position; the
        message names the file.
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
    magic, _, _, _, fingerprint = SHARD_HEADER.unpack(found)
    if magic != SHARD_MAGIC:
        raise DataError(f"{file}: has no header of a token shard; prepare the data again")
    if fingerprint.hex() != index.tokenizer_fingerprint:
        raise DataError(
            f"{file}: got tokens of tokenizer {fingerprint.hex()[:16]}; expected those of "
            f"{index.tokenizer_fingerprint[:16]}; prepare the data again"
        )
    raise DataError(f"{file}: belongs to another position or set; prepare the data again")


def check_hashes(directory: Path, entries: list[FileEntry]) -> None:
    """Compare the SHA-256 of several files with the index, in parallel threads.

    Raises
    ------
    DataError
        If a file differs; the message names the first one.
    """
    with ThreadPoolExecutor() as threads:  # hashing releases the GIL
        for _ in threads.map(lambda entry: check_hash(directory, entry), entries):
            pass


def check_hash(directory: Path, entry: FileEntry, *, fix: str = PREPARE_AGAIN) -> None:
    """Compare the size and SHA-256 of a file with its record.

    Parameters
    ----------
    directory, entry, fix
        As of `check_size`.

    Raises
    ------
    DataError
        If they differ; the message names the file.
    """
    check_size(directory, entry, fix=fix)
    file = directory / entry.name
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(_unreadable(file, error)) from error
    if found != entry.sha256:
        raise DataError(
            f"{file}: SHA-256 is {found}; expected {entry.sha256} as recorded; it is damaged or "
            f"from another set; {fix}"
        )


def read_starts(directory: Path, index: Index, split: SplitName) -> npt.NDArray[np.int64]:
    """Return the position of each document's first token in the stream, int64 [documents].

    Raises
    ------
    DataError
        If the file has the wrong size, or positions are not ascending within the stream.
    """
    entry, n_tokens = index.splits[split].starts, index.splits[split].n_tokens
    check_size(directory, entry)
    starts = np.fromfile(directory / entry.name, "<u8")
    n_eot = 0 if index.eot_id is None else 1  # one before the first document and after each
    in_order = not starts.size or (
        starts[0] == n_eot
        and starts.max() <= n_tokens
        and (np.diff(starts.astype(np.int64), append=n_tokens) >= n_eot).all()
    )
    if not in_order:
        raise DataError(
            f"{directory / entry.name}: document positions are not ascending within the {n_tokens} "
            "tokens of the split; it is damaged: prepare the data again"
        )
    return starts.astype(np.int64)


def _unreadable(file: Path, error: OSError) -> str:
    return f"{file}: cannot be read ({error.strerror}); check its permissions and disk"
