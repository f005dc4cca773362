"""Assembly of tokenized parts into a prepared set, in the order of the corpus."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tjx_core import write_atomically
from tjx_data.corpora.documents import Holdout, SplitName
from tjx_data.prepared.index import (
    MALFORMED_FILE,
    TOKENIZER_FILE,
    FileEntry,
    Index,
    SplitIndex,
    write_index,
)
from tjx_data.prepared.shard_writer import SplitWriter
from tjx_data.prepared.token_budget import cut_tokens
from tjx_data.prepared.tokenize_parts import SPLITS, PartRecord, read_tokens, token_dtype
from tjx_data.tokenization.tokenizer import Tokenizer


class PrepareSettings(NamedTuple):
    """Settings of `prepare` that determine the content of a set."""

    holdout: Holdout
    holdout_fraction: float
    shard_tokens: int
    strict: bool
    max_tokens: int | None = None


def part_file(work: Path, number: int) -> Path:
    """Return the file of a part's tokens in the work folder."""
    return work / f"part_{number:07d}.npz"


def assemble(
    work: Path,
    records: Mapping[int, PartRecord],
    source: Mapping[str, str],
    tokenizer: Tokenizer,
    settings: PrepareSettings,
) -> Index:
    """Write a complete set from the files of all parts into the folder ``work / "set"``.

    Parameters
    ----------
    work : Path
        Work folder with the tokenizer and a `part_file` for each record.
    records : Mapping[int, PartRecord]
        Records of the parts by their number, in the order of the corpus.
    source : Mapping
        Description of the corpus.
    tokenizer : Tokenizer
        The tokenizer that made the tokens.
    settings : PrepareSettings
        Settings of the set.

    Raises
    ------
    ValueError
        If a split has no document.
    """
    folder = work / "set"
    folder.mkdir()
    splits = {
        split: _write_split(work, folder, split, records, tokenizer, settings) for split in SPLITS
    }
    found = list(records.values())
    _check_splits(splits, found, settings)
    index = Index(
        dtype=token_dtype(tokenizer).name,
        shard_tokens=settings.shard_tokens,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer=_write(folder / TOKENIZER_FILE, (work / TOKENIZER_FILE).read_bytes()),
        holdout=settings.holdout,
        holdout_fraction=settings.holdout_fraction,
        n_empty_documents=sum(record.n_empty for record in found),
        n_malformed=sum(record.n_malformed for record in found),
        malformed=_write_malformed(folder, found),
        source=dict(source),
        splits=splits,
    )
    write_index(folder, index)
    return index


def _write_split(
    work: Path,
    folder: Path,
    split: SplitName,
    records: Mapping[int, PartRecord],
    tokenizer: Tokenizer,
    settings: PrepareSettings,
) -> SplitIndex:
    writer = SplitWriter(
        folder,
        split,
        dtype=token_dtype(tokenizer),
        shard_tokens=settings.shard_tokens,
        eot_id=tokenizer.eot_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    try:
        n_eot = 0 if tokenizer.eot_id is None else 1  # before the first document
        for number, record in records.items():
            tokens, lengths = read_tokens(part_file(work, number), split)
            n_text_bytes = record.n_text_bytes[split]
            if split == "train" and settings.max_tokens is not None:
                room = settings.max_tokens - max(writer.n_tokens, n_eot)
                if len(tokens) > room:
                    tokens, lengths, n_text_bytes = cut_tokens(tokens, lengths, room, tokenizer)
            writer.add(tokens, lengths, n_text_bytes=n_text_bytes)
        return writer.close()
    except BaseException:
        writer.abort()
        raise


def _write_malformed(folder: Path, records: list[PartRecord]) -> FileEntry | None:
    found = [entry for record in records for entry in record.malformed]
    if not found:
        return None
    lines = [
        json.dumps({"file": file, "line": line, "reason": reason}) for file, line, reason in found
    ]
    return _write(folder / MALFORMED_FILE, ("\n".join(lines) + "\n").encode())


def _write(file: Path, content: bytes) -> FileEntry:
    write_atomically(file, content)
    digest = hashlib.sha256(content).hexdigest()
    return FileEntry(name=file.name, n_bytes=len(content), sha256=digest)


def _check_splits(
    splits: Mapping[SplitName, SplitIndex], records: list[PartRecord], settings: PrepareSettings
) -> None:
    n_train, n_validation = splits["train"].n_documents, splits["validation"].n_documents
    n_documents, fraction = n_train + n_validation, settings.holdout_fraction
    if n_documents == 0:
        n_malformed = sum(record.n_malformed for record in records)
        first = next((entry for record in records for entry in record.malformed), None)
        details = ""
        if first is not None:
            file, line, reason = first
            details = (
                f": {n_malformed} records are malformed; the first is {file}, line {line}: {reason}"
            )
        raise ValueError(f"documents: got no document with text{details}")
    if n_train and n_validation:
        return
    lacking = "training" if n_validation else "validation"
    if settings.holdout == "official":
        raise ValueError(
            f"holdout: got 'official'; the corpus's split has no text for {lacking}; choose "
            "'documents'"
        )
    if settings.holdout == "tail":
        raise ValueError(
            f"holdout_fraction: got {fraction}, which leaves no text for {lacking}; choose a "
            "number nearer to 0.5, or a larger corpus"
        )
    if n_documents == 1:
        raise ValueError(
            "holdout: got 'documents' for a single document; expected 'tail', which holds out the "
            "end of the text"
        )
    raise ValueError(
        f"holdout: got 'documents' with holdout_fraction={fraction}, which leaves none of the "
        f"{n_documents} documents for {lacking}; choose 'tail', which splits the text by length, "
        "or a larger corpus"
    )
