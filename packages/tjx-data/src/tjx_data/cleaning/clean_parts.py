"""Cleaning of one part of a corpus into a file: the unit of parallel work and of resuming."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tjx_data.cleaning.clean_config import CleanConfig
from tjx_data.cleaning.contamination import is_contaminated
from tjx_data.cleaning.language import find_identifier, is_in_languages
from tjx_data.cleaning.near_duplicates import N_VALUES, signature
from tjx_data.cleaning.rules import Measures, find_masks, find_rules
from tjx_data.cleaning.scores import split_score
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
    config : CleanConfig
        Settings.
    evaluation : Path or None
        File of the n-grams of evaluation texts, whose name has their hash.
    """

    part: Part
    file: Path
    config: CleanConfig
    evaluation: Path | None


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
    drop_reason = _drop_reasons(task)
    masks = find_masks(task.config.masks)
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
        score, unscored = None, document
        if task.config.min_score is not None:
            score, unscored = split_score(document)
        # A lone surrogate has no UTF-8 and becomes "?".
        text = unscored.encode("utf-8", "replace").decode()
        size = len(text.encode())
        n_bytes += size
        reason = "malformed" if text != unscored else drop_reason(text, score)
        if reason is not None:
            add_dropped(dropped, reason, size, text)
            continue
        digests.append(hashlib.sha256(text.encode()).digest()[:16])
        if task.config.near_duplicates is not None:
            signatures.append(signature(word_hashes(normalized_words(text)))[None])
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


def _drop_reasons(task: CleanTask) -> Callable[[str, float | None], str | None]:
    """Return the function from a text and its score to a reason to drop it, or None."""
    config, rules = task.config, find_rules(task.config.rules)
    evaluation = {} if task.evaluation is None else _load_evaluation(task.evaluation)
    identify = None
    if config.language_identifier is not None:
        identify = find_identifier(config.language_identifier)

    def drop_reason(text: str, score: float | None) -> str | None:
        if is_empty(text):
            return "empty"
        if score is not None and math.isnan(score):
            return "malformed"
        if score is not None and config.min_score is not None and score < config.min_score:
            return "score"
        if identify is not None and not is_in_languages(
            text, identify, config.languages, config.min_language_score
        ):
            return "language"
        if is_contaminated(text, evaluation):
            return "contaminated"
        measures = Measures(text)
        return next((rule.name for rule in rules if not rule.keeps(measures)), None)

    return drop_reason


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
