"""Documents of a corpus in re-readable parts, and their division into splits."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple, Protocol, runtime_checkable

Holdout = Literal["documents", "tail", "official"]
SplitName = Literal["train", "validation"]

PART_CHARACTERS = 1 << 21
"""Approximate size of the parts made by `cut_into_parts`."""

FEW_DOCUMENTS = 300
"""With more documents, a tenth of which is held out by hash, none is held out once in 10^13."""


class Stage(NamedTuple):
    """Progress of a long operation.

    Attributes
    ----------
    name : str
        The operation: ``train tokenizer`` or ``write shards``.
    done : int
        Bytes of text finished.
    total : int or None
        Approximate number of bytes in total; None if unknown.
    tokens : int or None
        Tokens made so far, for operations that make tokens.
    """

    name: str
    done: int
    total: int | None = None
    tokens: int | None = None


Progress = Callable[[Stage], None]
"""Progress callback."""


class Malformed(NamedTuple):
    """A record without a document.

    Attributes
    ----------
    file : str
        File of the record.
    line : int
        Line or row in the file, from 1.
    reason : str
        Description of the error.
    """

    file: str
    line: int
    reason: str


@runtime_checkable
class Part(Protocol):
    """A contiguous part of a corpus that a worker process reads independently; picklable."""

    @property
    def identity(self) -> str:
        """A string that differs for parts with other documents."""

    def read(self) -> Iterator[str | Malformed]:
        """Yield the documents, the same ones in the same order on every call."""


@dataclass(frozen=True)
class InMemoryPart:
    """A part that holds its documents."""

    documents: tuple[str | Malformed, ...]

    @property
    def identity(self) -> str:
        """SHA-256 of the documents and their lengths."""
        hasher = hashlib.sha256()
        for document in self.documents:
            text = document if isinstance(document, str) else repr(document)
            content = text.encode("utf-8", "surrogatepass")
            hasher.update(f"{len(content)}\n".encode() + content)
        return hasher.hexdigest()

    def read(self) -> Iterator[str | Malformed]:
        """Yield the documents."""
        return iter(self.documents)


def cut_into_parts(documents: Iterable[str | Malformed]) -> Iterator[InMemoryPart]:
    """Group consecutive documents into parts of about `PART_CHARACTERS`, lazily."""
    found: list[str | Malformed] = []
    n_characters = 0
    for document in documents:
        found.append(document)
        n_characters += len(document)
        if n_characters >= PART_CHARACTERS:
            yield InMemoryPart(tuple(found))
            found, n_characters = [], 0
    if found:
        yield InMemoryPart(tuple(found))


@dataclass(frozen=True)
class Documents:
    """Re-readable documents with a description of their source.

    Attributes
    ----------
    source : Mapping[str, str]
        Description of the source, stored in the index of sets prepared from it.
    parts : Callable[[], Iterable[Part]]
        Starts a new pass over the parts, the same ones in the same order on every call.
    n_bytes : int or None
        Approximate number of bytes of text; None if unknown.
    held_out : Callable or None
        As `parts`, for the official validation split of the corpus; None if it was not opened.

    Examples
    --------
    >>> two = Documents.of(lambda: ["one text", "another"], {"corpus": "two"})
    >>> list(two) == list(two)
    True
    """

    source: Mapping[str, str]
    parts: Callable[[], Iterable[Part]]
    n_bytes: int | None = None
    held_out: Callable[[], Iterable[Part]] | None = None

    @classmethod
    def of(
        cls,
        read: Callable[[], Iterable[str | Malformed]],
        source: Mapping[str, str],
        n_bytes: int | None = None,
    ) -> "Documents":
        """Return documents that are read in this process and passed to workers by value.

        Parameters
        ----------
        read : Callable
            Starts a new pass over the documents.
        source, n_bytes
            As of the class.

        Returns
        -------
        Documents
            The documents.
        """
        return cls(source, lambda: cut_into_parts(read()), n_bytes)

    def __iter__(self) -> Iterator[str]:
        return _texts(self.parts())

    def with_held_out(self) -> Iterator[str]:
        """Yield all documents, then those of the official validation split."""
        yield from self
        if self.held_out is not None:
            yield from _texts(self.held_out())


def _texts(parts: Iterable[Part]) -> Iterator[str]:
    for part in parts:
        for document in part.read():
            if isinstance(document, str):
                yield document


def is_empty(text: str) -> bool:
    """Return whether a document consists of white space only."""
    return not text or text.isspace()


def assign_split(text: str, holdout_fraction: float) -> SplitName:
    """Return the split of a document by its hash.

    Equal documents get the same split, independent of the order of the corpus.

    Parameters
    ----------
    text : str
        The document.
    holdout_fraction : float
        Probability of "validation".
    """
    return "validation" if _hash(text) < holdout_fraction * 2**64 else "train"


def has_both_splits(documents: Iterable[str], holdout_fraction: float) -> bool:
    """Return whether splitting by document leaves documents for both splits.

    Parameters
    ----------
    documents : iterable of str
        The corpus; read until the answer is known.
    holdout_fraction : float
        As of `assign_split`.

    Returns
    -------
    bool
        False if the corpus is less than one held-out document and `assign_split` gives all of its
        documents the same split.
    """
    splits = set()
    for n_documents, text in enumerate((text for text in documents if not is_empty(text)), start=1):
        splits.add(assign_split(text, holdout_fraction))
        if len(splits) == 2 or n_documents * holdout_fraction >= 1:
            return True
    return False


def fraction_of_few(documents: Iterable[str], holdout_fraction: float) -> float:
    """Return a fraction that holds out a document, also of a few that `assign_split` all trains on.

    Parameters
    ----------
    documents : iterable of str
        The corpus; only its first documents are read.
    holdout_fraction : float
        As of `assign_split`.

    Returns
    -------
    float
        The given fraction if it holds out a document, if it is less than one document, or if there
        are more than `FEW_DOCUMENTS`; else the least that holds out the document of the least hash.
    """
    few = list(islice((text for text in documents if not is_empty(text)), FEW_DOCUMENTS + 1))
    if len(few) > FEW_DOCUMENTS or len(few) * holdout_fraction < 1:
        return holdout_fraction
    least = min(map(_hash, few))
    return max(holdout_fraction, math.nextafter((least + 1) / 2**64, 1))


def _hash(text: str) -> int:
    # A document with lone surrogates has a hash too; the tokenizer raises the error.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def count_training_characters(n_characters: int, holdout_fraction: float) -> int:
    """Return the number of training characters of a text whose end is held out.

    nanoGPT computes ``data[:int(n * 0.9)]``; the same expression gives the same border.
    """
    return int(n_characters * (1 - holdout_fraction))


def split_at(documents: Iterable[str], n_train: int) -> Iterator[tuple[SplitName, str]]:
    """Yield documents with their split, of which the first `n_train` characters are for training.

    A document that crosses the border is cut in two.
    """
    for text in documents:
        head, tail = text[: max(n_train, 0)], text[max(n_train, 0) :]
        n_train -= len(head)
        if head or not text:
            yield "train", head
        if tail:
            yield "validation", tail


def training_texts(
    documents: Documents, holdout: Holdout, holdout_fraction: float
) -> Iterator[str]:
    """Yield the documents that are not held out.

    Parameters
    ----------
    documents : Documents
        The corpus; holdout "tail" reads it twice.
    holdout, holdout_fraction
        As of `prepare`.
    """
    if holdout == "official":
        yield from documents
        return
    if holdout == "documents":
        for text in documents:
            if assign_split(text, holdout_fraction) == "train":
                yield text
        return
    n_train = count_training_characters(sum(map(len, documents)), holdout_fraction)
    for split, text in split_at(documents, n_train):
        if split == "train":
            yield text
