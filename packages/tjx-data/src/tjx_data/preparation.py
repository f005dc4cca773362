"""Documents to a prepared set: tokens in shards, with an index, written whole or not at all."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tjx_data.atomic import sync_folder
from tjx_data.documents import (
    Documents,
    Holdout,
    Progress,
    SplitName,
    is_empty,
    split_documents,
)
from tjx_data.index import (
    INDEX_FILE,
    TOKENIZER_FILE,
    FileEntry,
    Index,
    SplitIndex,
    read_index,
    write_index,
)
from tjx_data.pieces import split_exactly
from tjx_data.shards import SplitWriter
from tjx_data.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20  # encoded at once, on all cores; bounds the memory
SHARD_TOKENS = 1 << 27  # 256 MiB of uint16


class _Piece(NamedTuple):
    split: SplitName
    text: str
    ends_document: bool


def prepare(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    holdout: Holdout = "documents",
    holdout_fraction: float = 0.1,
    shard_tokens: int = SHARD_TOKENS,
    source: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Index:
    """Turn documents into token shards with an index; see `tjx_data.index` for the files.

    The same documents and tokenizer give the same bytes. All is written to a folder beside
    `out_dir` that takes its name when it is complete, so that a set made in part is never taken
    for a whole one.

    Parameters
    ----------
    documents : Iterable[str]
        Whole documents; read once (``"documents"``) or twice (``"tail"``).
    tokenizer : Tokenizer
        If it has an end-of-text token, that stands before the first document and after each.
    out_dir : str or Path
        A folder that does not exist yet, or is empty.
    holdout : {"documents", "tail"}
        How validation is split off, see `tjx_data.documents.split_documents`.
    holdout_fraction : float
        The share that is held out, between 0 and 1.
    shard_tokens : int
        Tokens in a shard.
    source : Mapping[str, str], optional
        Where the text comes from; that of the documents, if they know it.
    progress : Progress, optional
        Told the bytes of text that are done.

    Returns
    -------
    Index
        What was written.

    Raises
    ------
    ValueError
        If a setting is wrong, `out_dir` holds something, or a split is left without a document.
    """
    if not 0 < holdout_fraction < 1:
        raise ValueError(f"holdout_fraction={holdout_fraction}: choose a number between 0 and 1")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens}: a shard holds at least 1 token")
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists and is not an empty folder; remove it or name another")
    if source is None:
        source = documents.source if isinstance(documents, Documents) else {}
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=temporary_prefix(out_dir)))
    try:
        splits, n_empty = _write_splits(
            split_documents(documents, holdout, holdout_fraction),
            tokenizer,
            folder,
            shard_tokens,
            progress,
        )
        _check_splits(splits, holdout, holdout_fraction)
        index = Index(
            dtype=_dtype(tokenizer).name,
            shard_tokens=shard_tokens,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokenizer=_save_tokenizer(tokenizer, folder),
            holdout=holdout,
            holdout_fraction=holdout_fraction,
            n_empty_documents=n_empty,
            source=dict(source),
            splits=splits,
        )
        write_index(folder, index)
        folder.chmod(0o755)  # mkdtemp makes private folders
        folder.rename(out_dir)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_folder(out_dir.parent)
    return index


def temporary_prefix(out_dir: Path) -> str:
    """Return how the names of folders begin in which `out_dir` is being made."""
    return f".{out_dir.name}.tmp-"


def is_prepared(directory: Path) -> bool:
    """Tell whether a folder holds a prepared set; a damaged one is an error, not a no."""
    if not (directory / INDEX_FILE).exists():
        return False
    read_index(directory)
    return True


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> FileEntry:
    file = folder / TOKENIZER_FILE
    tokenizer.save(file)
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return FileEntry(name=TOKENIZER_FILE, n_bytes=len(content), sha256=digest)


def _write_splits(
    documents: Iterator[tuple[SplitName, str]],
    tokenizer: Tokenizer,
    folder: Path,
    shard_tokens: int,
    progress: Progress | None,
) -> tuple[dict[SplitName, SplitIndex], int]:
    names: tuple[SplitName, SplitName] = ("train", "validation")
    writers = {
        name: SplitWriter(
            folder,
            name,
            dtype=_dtype(tokenizer),
            shard_tokens=shard_tokens,
            eot_id=tokenizer.eot_id,
        )
        for name in names
    }
    skipped: list[SplitName] = []
    try:
        for batch in _batches(_pieces(documents, tokenizer, skipped)):
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            for piece, ids in zip(batch, encoded, strict=True):
                writers[piece.split].add(
                    ids,
                    n_text_bytes=len(piece.text.encode("utf-8")),
                    ends_document=piece.ends_document,
                )
            if progress is not None:
                n_bytes = sum(writer.n_text_bytes for writer in writers.values())
                progress("write shards", n_bytes, None)
        return {name: writer.close() for name, writer in writers.items()}, len(skipped)
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise


def _pieces(
    documents: Iterator[tuple[SplitName, str]], tokenizer: Tokenizer, skipped: list[SplitName]
) -> Iterator[_Piece]:
    """Cut long documents where that changes no token; leave empty ones out."""
    for split, text in documents:
        if is_empty(text):
            skipped.append(split)
            continue
        texts = split_exactly(text) if tokenizer.always_splits_before_space else iter([text])
        last = next(texts)
        for following in texts:
            yield _Piece(split, last, ends_document=False)
            last = following
        yield _Piece(split, last, ends_document=True)


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    n_characters = 0
    for piece in pieces:
        batch.append(piece)
        n_characters += len(piece.text)
        if n_characters >= BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _check_splits(
    splits: Mapping[SplitName, SplitIndex], holdout: Holdout, holdout_fraction: float
) -> None:
    n_train, n_validation = splits["train"].n_documents, splits["validation"].n_documents
    if n_train + n_validation == 0:
        raise ValueError("the corpus holds no document with text in it")
    if n_train and n_validation:
        return
    lacking = "training" if n_validation else "validation"
    if holdout == "tail":
        raise ValueError(
            f"holdout_fraction={holdout_fraction} leaves no text for {lacking}; choose a number "
            "nearer to 0.5, or a larger corpus"
        )
    if n_train + n_validation == 1:
        raise ValueError(
            "the corpus is a single document, which holdout='documents' cannot split: choose "
            "holdout='tail', which holds out the end of the text"
        )
    raise ValueError(
        f"holdout='documents' with holdout_fraction={holdout_fraction} leaves none of the "
        f"{n_train + n_validation} documents for {lacking}; choose holdout='tail', which splits "
        "the text by its length, or a larger corpus"
    )
