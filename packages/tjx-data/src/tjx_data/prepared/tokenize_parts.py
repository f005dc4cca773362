"""One part of a corpus to a file of tokens: the work that runs in parallel, and survives a kill.

What is found in the file depends on the part, the tokenizer and the holdout alone, whoever makes
it. The file appears whole or not at all.
"""

import io
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tjx_data.atomic import write_atomically
from tjx_data.corpora.documents import (
    Holdout,
    Malformed,
    Part,
    SplitName,
    assign_split,
    is_empty,
    split_at,
)
from tjx_data.prepared.npz import read_arrays
from tjx_data.tokenization.tokenizer import Tokenizer

SPLITS: tuple[SplitName, SplitName] = ("train", "validation")
MALFORMED_KEPT = 100  # of a part; more are counted and not listed

Tokens = npt.NDArray[np.unsignedinteger]
Lengths = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """What a process needs to know to tokenise a part.

    Attributes
    ----------
    part : Part
        The documents.
    split : SplitName
        With holdout "official": the split that they are of.
    tokenizer : Path
        A ``tokenizer.json``.
    file : Path
        Where the tokens go.
    holdout, holdout_fraction
        How validation is split off.
    n_train_characters : int
        With holdout "tail": characters from the start of this part on that are for training.
    strict : bool
        Whether a malformed record is an error.
    """

    part: Part
    split: SplitName
    tokenizer: Path
    file: Path
    holdout: Holdout
    holdout_fraction: float
    n_train_characters: int
    strict: bool


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What is known of a part that was tokenised.

    Attributes
    ----------
    identity : str
        Of the part and of what was done with it.
    n_text_bytes : dict
        Bytes of text in UTF-8, by split.
    n_tokens : int
        Tokens of both splits.
    n_empty : int
        Documents that held nothing but white space.
    n_malformed : int
        Records that held no document.
    malformed : list
        The first of them: file, line, reason.
    """

    identity: str
    n_text_bytes: dict[str, int]
    n_tokens: int
    n_empty: int
    n_malformed: int
    malformed: list[tuple[str, int, str]]


def part_identity(task: PartTask) -> str:
    """Return another string for another part, or another border through it."""
    if task.holdout == "documents":
        return task.part.identity
    return f"{task.part.identity} {task.n_train_characters} {task.split}"


def count_characters(part: Part) -> int:
    """Return the characters of a part's documents."""
    return sum(len(text) for text in part.read() if isinstance(text, str))


def tokenize_part(task: PartTask) -> PartRecord:
    """Tokenise a part into its file.

    Raises
    ------
    ValueError
        If a document cannot be tokenised, or a record is malformed and that is not allowed.
    """
    tokenizer = _load_tokenizer(task.tokenizer, task.tokenizer.stat().st_mtime_ns)
    collected = {split: _Collected(token_dtype(tokenizer), tokenizer.eot_id) for split in SPLITS}
    reading = _Reading(task)
    for ids in tokenizer.encode_iterable(reading.texts()):
        split, n_text_bytes = reading.encoded()
        collected[split].add(ids, n_text_bytes)
    record = PartRecord(
        identity=part_identity(task),
        n_text_bytes={split: found.n_text_bytes for split, found in collected.items()},
        n_tokens=sum(found.n_tokens for found in collected.values()),
        n_empty=reading.n_empty,
        n_malformed=reading.n_malformed,
        malformed=[(entry.file, entry.line, entry.reason) for entry in reading.malformed],
    )
    _save(task.file, record, {split: found.arrays() for split, found in collected.items()})
    return record


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Return how a token is stored."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


@cache
def _load_tokenizer(file: Path, mtime_ns: int) -> Tokenizer:
    assert mtime_ns  # a worker that lives long must not use the tokenizer of another run
    return Tokenizer.load(file)


class _Reading:
    """The documents of a part, and what was not one."""

    def __init__(self, task: PartTask):
        self._task = task
        self._ahead: deque[tuple[SplitName, int]] = deque()  # read and not encoded yet
        self.n_empty = 0
        self.n_malformed = 0
        self.malformed: list[Malformed] = []

    def texts(self) -> Iterator[str]:
        """Yield the documents of both splits, in order."""
        for split, text in self._split():
            if is_empty(text):
                self.n_empty += 1
                continue
            # Lone surrogates have no UTF-8; the tokenizer says so.
            self._ahead.append((split, len(text.encode("utf-8", "surrogatepass"))))
            yield text

    def encoded(self) -> tuple[SplitName, int]:
        """Return the split of the next document that is encoded, and its bytes of text."""
        return self._ahead.popleft()

    def _split(self) -> Iterator[tuple[SplitName, str]]:
        task = self._task
        if task.holdout == "tail":
            yield from split_at(self._documents(), task.n_train_characters)
            return
        for text in self._documents():
            if task.holdout == "official":
                yield task.split, text
                continue
            yield assign_split(text, task.holdout_fraction), text

    def _documents(self) -> Iterator[str]:
        for document in self._task.part.read():
            if isinstance(document, str):
                yield document
                continue
            if self._task.strict:
                raise ValueError(f"{document.file}, line {document.line}: {document.reason}")
            self.n_malformed += 1
            if len(self.malformed) < MALFORMED_KEPT:
                self.malformed.append(document)


class _Collected:
    """The tokens of one split of a part."""

    def __init__(self, dtype: np.dtype[Any], eot_id: int | None):
        self._dtype = dtype
        self._eot = [] if eot_id is None else [eot_id]
        self._tokens: list[Tokens] = [np.array([], dtype)]
        self._lengths: list[int] = []
        self.n_text_bytes = 0

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents, ends of text included."""
        return sum(self._lengths)

    def add(self, ids: list[int], n_text_bytes: int) -> None:
        """Append the tokens of a document."""
        self._tokens.append(np.array(ids + self._eot, self._dtype))
        self._lengths.append(len(self._tokens[-1]))
        self.n_text_bytes += n_text_bytes

    def arrays(self) -> tuple[Tokens, Lengths]:
        """Return all tokens, and how many each document has."""
        return np.concatenate(self._tokens), np.array(self._lengths, "<u8")


def _save(file: Path, record: PartRecord, arrays: dict[SplitName, tuple[Tokens, Lengths]]) -> None:
    content = io.BytesIO()
    content_of_record = json.dumps(vars(record)).encode()
    named: dict[str, npt.NDArray[Any]] = {"record": np.frombuffer(content_of_record, np.uint8)}
    for split, (tokens, lengths) in arrays.items():
        named |= {split: tokens, f"{split}_lengths": lengths}
    np.savez(content, allow_pickle=False, **named)
    write_atomically(file, content.getvalue())


def read_record(file: Path) -> PartRecord | None:
    """Return what is known of a part that was tokenised before; None if there is no such file.

    A file that cannot be read is no file: the part is made again.
    """
    try:
        fields = json.loads(read_arrays(file)["record"].tobytes())
        fields["malformed"] = [tuple(record) for record in fields["malformed"]]
        return PartRecord(**fields)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_tokens(file: Path, split: SplitName) -> tuple[Tokens, Lengths]:
    """Return a part's tokens of one split, and how many each document has."""
    arrays = read_arrays(file)
    return arrays[split], arrays[f"{split}_lengths"]
