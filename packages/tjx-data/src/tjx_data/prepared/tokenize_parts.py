"""Tokenization of one part of a corpus into a file: the unit of parallel work and of resuming.

The content of the file depends on the part, the tokenizer and the holdout only, not on the process
that writes it.
"""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.documents import (
    Holdout,
    Malformed,
    Part,
    SplitName,
    assign_split,
    is_empty,
    split_at,
)
from tjx_data.prepared.npz import read_arrays, write_arrays
from tjx_data.tokenization.tokenizer import Tokenizer

SPLITS: tuple[SplitName, SplitName] = ("train", "validation")
MAX_MALFORMED_LISTED = 100
"""Malformed records of a part that are listed; more are counted only."""

Tokens = npt.NDArray[np.unsignedinteger]
Lengths = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """Arguments of `tokenize_part`.

    Attributes
    ----------
    part : Part
        Documents to tokenize.
    split : SplitName
        With holdout "official": the split of the documents.
    tokenizer : Path
        A ``tokenizer.json``.
    file : Path
        Output file.
    holdout, holdout_fraction
        How the validation split is made.
    n_train_characters : int
        With holdout "tail": number of characters from the start of this part that are for training.
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
    """Counts of a tokenized part, stored with its tokens.

    Attributes
    ----------
    identity : str
        Identity of the part and its split, from `part_identity`.
    n_text_bytes : dict
        Bytes of text in UTF-8, by split.
    n_tokens, n_train_tokens : int
        Tokens of both splits, and of the training split.
    n_empty : int
        Documents of white space only.
    n_malformed : int
        Malformed records.
    malformed : list
        File, line and reason of the first of them.
    """

    identity: str
    n_text_bytes: dict[str, int]
    n_tokens: int
    n_train_tokens: int
    n_empty: int
    n_malformed: int
    malformed: list[tuple[str, int, str]]


def part_identity(task: PartTask) -> str:
    """Return a string that differs for other documents or another split of them."""
    if task.holdout == "documents":
        return task.part.identity
    return f"{task.part.identity} {task.n_train_characters} {task.split}"


def count_characters(part: Part) -> int:
    """Count the characters of a part's documents."""
    return sum(len(text) for text in part.read() if isinstance(text, str))


def tokenize_part(task: PartTask) -> PartRecord:
    """Tokenize a part and write its tokens to a file, atomically.

    Returns
    -------
    PartRecord
        Counts of the part.

    Raises
    ------
    ValueError
        If a document cannot be tokenized, or a record is malformed and `task.strict` is set.
    """
    tokenizer = _load_tokenizer(task.tokenizer, task.tokenizer.stat().st_mtime_ns)
    writers = {split: _SplitTokens(token_dtype(tokenizer), tokenizer.eot_id) for split in SPLITS}
    reader = _PartReader(task)
    for ids in tokenizer.encode_iterable(reader.texts()):
        split, n_text_bytes = reader.pop_encoded()
        writers[split].add(ids, n_text_bytes)
    record = PartRecord(
        identity=part_identity(task),
        n_text_bytes={split: writer.n_text_bytes for split, writer in writers.items()},
        n_tokens=sum(writer.n_tokens for writer in writers.values()),
        n_train_tokens=writers["train"].n_tokens,
        n_empty=reader.n_empty,
        n_malformed=reader.n_malformed,
        malformed=[(entry.file, entry.line, entry.reason) for entry in reader.malformed],
    )
    arrays: dict[str, npt.NDArray[Any]] = {
        "record": np.frombuffer(json.dumps(vars(record)).encode(), np.uint8)
    }
    for split, writer in writers.items():
        arrays[split], arrays[f"{split}_lengths"] = writer.arrays()
    write_arrays(task.file, arrays)
    return record


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Return the dtype in which tokens are stored: uint16 if it holds all ids, else uint32."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


@cache
def _load_tokenizer(file: Path, mtime_ns: int) -> Tokenizer:
    assert mtime_ns  # part of the key, so that a long-lived worker reloads a changed file
    return Tokenizer.load(file)


class _PartReader:
    """Read the documents of a part, assign splits and count omitted documents."""

    def __init__(self, task: PartTask):
        self._task = task
        self._pending: deque[tuple[SplitName, int]] = deque()  # read, not encoded yet
        self.n_empty = 0
        self.n_malformed = 0
        self.malformed: list[Malformed] = []

    def texts(self) -> Iterator[str]:
        """Yield the documents of both splits in order."""
        for split, text in self._with_splits():
            if is_empty(text):
                self.n_empty += 1
                continue
            # Lone surrogates have no UTF-8; the tokenizer raises the error.
            self._pending.append((split, len(text.encode("utf-8", "surrogatepass"))))
            yield text

    def pop_encoded(self) -> tuple[SplitName, int]:
        """Return split and bytes of text of the next encoded document."""
        return self._pending.popleft()

    def _with_splits(self) -> Iterator[tuple[SplitName, str]]:
        task = self._task
        if task.holdout == "tail":
            yield from split_at(self._documents(), task.n_train_characters)
            return
        for text in self._documents():
            if task.holdout == "official":
                yield task.split, text
            else:
                yield assign_split(text, task.holdout_fraction), text

    def _documents(self) -> Iterator[str]:
        for document in self._task.part.read():
            if isinstance(document, str):
                yield document
                continue
            if self._task.strict:
                raise ValueError(f"{document.file}, line {document.line}: {document.reason}")
            self.n_malformed += 1
            if len(self.malformed) < MAX_MALFORMED_LISTED:
                self.malformed.append(document)


class _SplitTokens:
    """Accumulate the tokens of one split of a part."""

    def __init__(self, dtype: np.dtype[Any], eot_id: int | None):
        self._dtype = dtype
        self._eot = [] if eot_id is None else [eot_id]
        self._tokens: list[Tokens] = [np.array([], dtype)]
        self._lengths: list[int] = []
        self.n_text_bytes = 0

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all documents, end-of-text tokens included."""
        return sum(self._lengths)

    def add(self, ids: list[int], n_text_bytes: int) -> None:
        """Append the tokens of a document."""
        self._tokens.append(np.array(ids + self._eot, self._dtype))
        self._lengths.append(len(self._tokens[-1]))
        self.n_text_bytes += n_text_bytes

    def arrays(self) -> tuple[Tokens, Lengths]:
        """Return all tokens [sum of lengths] and the length of each document [documents]."""
        return np.concatenate(self._tokens), np.array(self._lengths, "<u8")


def read_record(file: Path) -> PartRecord | None:
    """Return the record of a part that was tokenized before, or None without a readable file."""
    try:
        fields = json.loads(read_arrays(file)["record"].tobytes())
        fields["malformed"] = [tuple(record) for record in fields["malformed"]]
        return PartRecord(**fields)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the part is tokenized again


def read_tokens(file: Path, split: SplitName) -> tuple[Tokens, Lengths]:
    """Return a part's tokens of one split [sum of lengths] and document lengths [documents]."""
    arrays = read_arrays(file)
    return arrays[split], arrays[f"{split}_lengths"]
