"""Cleaning of one part of a corpus into a file: the unit of parallel work and of resuming."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tjx_data.cleaning.contamination import is_contaminated
from tjx_data.cleaning.near_duplicates import N_VALUES, signature
from tjx_data.cleaning.rules import MASKS, RULES, Measures
from tjx_data.cleaning.words import Hashes, normalized_words, word_hashes
from tjx_data.corpora.documents import Malformed, Part, is_empty
from tjx_data.prepared.npz import Arrays, read_arrays, write_arrays

N_EXAMPLES = 3
EXAMPLE_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class CleanTask:
    """Arguments of `clean_part`.

    Attributes
    ----------
    part : Part
        Documents to clean.
    file : Path
        Output file.
    rules, masks : tuple of str
        Names of the rules and masks.
    evaluation : Path or None
        File of the n-grams of evaluation texts, whose name has their hash.
    with_signatures : bool
        Whether near-duplicates are searched.
    """

    part: Part
    file: Path
    rules: tuple[str, ...]
    masks: tuple[str, ...]
    evaluation: Path | None
    with_signatures: bool


@dataclass(frozen=True, kw_only=True)
class CleanRecord:
    """Counts of a cleaned part.

    Attributes
    ----------
    identity : str
        Identity of the part.
    n_documents, n_bytes : int
        Documents read and their bytes in UTF-8.
    dropped : dict
        By reason: documents, bytes and examples.
    masked : dict
        Replacements by mask.
    """

    identity: str
    n_documents: int
    n_bytes: int
    dropped: dict[str, tuple[int, int, list[str]]]
    masked: dict[str, int]


def clean_part(task: CleanTask) -> CleanRecord:
    """Apply all rules that need one document only, and write the kept documents to a file.

    Returns
    -------
    CleanRecord
        Counts of the part.
    """
    rules = [rule for rule in RULES if rule.name in task.rules]
    masks = [mask for mask in MASKS if mask.name in task.masks]
    evaluation = {} if task.evaluation is None else _load_evaluation(task.evaluation)
    dropped: dict[str, tuple[int, int, list[str]]] = {}
    masked: Counter[str] = Counter()
    texts, digests, signatures = [], [], [np.zeros((0, N_VALUES), np.uint32)]
    n_documents = n_bytes = 0
    for document in task.part.read():
        n_documents += 1
        if isinstance(document, Malformed):
            location = f"{document.file}, line {document.line}: {document.reason}"
            add_dropped(dropped, "malformed", 0, location)
            continue
        # A lone surrogate has no UTF-8 and becomes "?".
        text = document.encode("utf-8", "replace").decode()
        size = len(text.encode())
        n_bytes += size
        words = word_hashes(normalized_words(text))
        measures = Measures(text)
        if text != document:
            reason: str | None = "malformed"
        elif is_empty(text):
            reason = "empty"
        elif is_contaminated(words, evaluation):
            reason = "contaminated"
        else:
            reason = next((rule.name for rule in rules if not rule.keeps(measures)), None)
        if reason is not None:
            add_dropped(dropped, reason, size, text)
            continue
        digests.append(hashlib.sha256(text.encode()).digest()[:16])
        if task.with_signatures:
            signatures.append(signature(words)[None])
        for mask in masks:
            text, count = mask.pattern.subn(mask.replacement, text)
            masked[mask.name] += count
        texts.append(text.encode())
    record = CleanRecord(
        identity=task.part.identity,
        n_documents=n_documents,
        n_bytes=n_bytes,
        dropped=dropped,
        masked=dict(sorted(masked.items())),
    )
    write_arrays(
        task.file,
        {
            "record": np.frombuffer(json.dumps(vars(record)).encode(), np.uint8),
            "text": np.frombuffer(b"".join(texts), np.uint8),
            "lengths": np.array([len(text) for text in texts], np.int64),
            "digests": np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16),
            "signatures": np.concatenate(signatures),
        },
    )
    return record


def add_dropped(
    dropped: dict[str, tuple[int, int, list[str]]], reason: str, size: int, text: str
) -> None:
    """Count a dropped document; the first of each reason are kept as examples."""
    n, n_bytes, examples = dropped.get(reason, (0, 0, []))
    if len(examples) < N_EXAMPLES:
        examples = [*examples, text[:EXAMPLE_CHARACTERS]]
    dropped[reason] = n + 1, n_bytes + size, examples


def read_clean_record(file: Path) -> CleanRecord | None:
    """Return the record of a part that was cleaned before, or None without a readable file."""
    try:
        fields = json.loads(read_arrays(file)["record"].tobytes())
        fields["dropped"] = {reason: tuple(found) for reason, found in fields["dropped"].items()}
        return CleanRecord(**fields)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the part is cleaned again


def kept_texts(arrays: Arrays) -> Iterator[str]:
    """Yield the documents in a part's file."""
    content, start = arrays["text"].tobytes(), 0
    for length in arrays["lengths"].tolist():
        yield content[start : start + length].decode()
        start += length


@cache
def _load_evaluation(file: Path) -> dict[int, Hashes]:
    return {int(n): hashes for n, hashes in read_arrays(file).items()}
