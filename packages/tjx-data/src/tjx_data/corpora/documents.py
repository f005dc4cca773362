"""A corpus seen as documents in parts: a source that can be read again and again, by anybody."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

Holdout = Literal["documents", "tail", "official"]
SplitName = Literal["train", "validation"]

PART_CHARACTERS = 1 << 21  # about as many in a part that is cut here


class Stage(NamedTuple):
    """How far something is that takes long.

    Attributes
    ----------
    name : str
        What is being done: ``train tokenizer``, ``write shards``.
    done : int
        Bytes of text done so far.
    total : int or None
        Bytes there are in all, about; None is not known.
    tokens : int or None
        Tokens made so far, where tokens are made.
    """

    name: str
    done: int
    total: int | None = None
    tokens: int | None = None


Progress = Callable[[Stage], None]


class Malformed(NamedTuple):
    """A record that holds no document.

    Attributes
    ----------
    file : str
        Where it lies.
    line : int
        Which line of the file, or row, counted from 1.
    reason : str
        What is wrong with it.
    """

    file: str
    line: int
    reason: str


@runtime_checkable
class Part(Protocol):
    """A stretch of a corpus that a process reads by itself; it can be pickled."""

    @property
    def identity(self) -> str:
        """Another string for other documents."""

    def read(self) -> Iterator[str | Malformed]:
        """Yield the documents, always the same ones in the same order."""


@dataclass(frozen=True)
class InMemoryPart:
    """A part that carries its documents with it."""

    documents: tuple[str | Malformed, ...]

    @property
    def identity(self) -> str:
        """The hash of the documents, lengths included."""
        hasher = hashlib.sha256()
        for document in self.documents:
            text = document if isinstance(document, str) else repr(document)
            content = text.encode("utf-8", "surrogatepass")
            hasher.update(f"{len(content)}\n".encode() + content)
        return hasher.hexdigest()

    def read(self) -> Iterator[str | Malformed]:
        """Yield the documents."""
        return iter(self.documents)


def cut(documents: Iterable[str | Malformed]) -> Iterator[InMemoryPart]:
    """Cut documents, as they come, into parts of about `PART_CHARACTERS`."""
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
    """Documents that can be read more than once, with a description of where they come from.

    Attributes
    ----------
    source : Mapping[str, str]
        Where the text comes from; it is kept in the index of what is prepared from it.
    parts : Callable[[], Iterable[Part]]
        Starts a new pass over the parts, always the same ones in the same order.
    n_bytes : int or None
        Bytes of text in all, about; None is not known.
    held_out : Callable or None
        As `parts`, for the corpus's official validation split; None where it was not opened.

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
        """Return documents that this process reads, whoever works on them.

        Parameters
        ----------
        read : Callable
            Starts a new pass over them.
        source, n_bytes
            As of the class.
        """
        return cls(source, lambda: cut(read()), n_bytes)

    def __iter__(self) -> Iterator[str]:
        return _texts_of(self.parts())

    def with_held_out(self) -> Iterator[str]:
        """Yield the documents, then those of the official validation split."""
        yield from self
        if self.held_out is not None:
            yield from _texts_of(self.held_out())


def _texts_of(parts: Iterable[Part]) -> Iterator[str]:
    for part in parts:
        for document in part.read():
            if isinstance(document, str):
                yield document


def is_empty(text: str) -> bool:
    """Tell whether a document holds nothing but white space."""
    return not text or text.isspace()


def assign_split(text: str, holdout_fraction: float) -> SplitName:
    """Return the split of a document by its hash.

    Equal documents share a side, and the order of the corpus does not matter.
    """
    # A document with lone surrogates still has a side; the tokenizer says what is wrong with it.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    number = int.from_bytes(digest[:8], "big")
    return "validation" if number < holdout_fraction * 2**64 else "train"


def border(n_characters: int, holdout_fraction: float) -> int:
    """Return how many characters of a text are for training where its end is held out.

    nanoGPT writes ``data[:int(n * 0.9)]``; the same expression gives the same border.
    """
    return int(n_characters * (1 - holdout_fraction))


def split_at(documents: Iterable[str], n_train: int) -> Iterator[tuple[SplitName, str]]:
    """Yield documents with their split, where the first `n_train` characters are for training.

    A document that the border crosses is cut in two.
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
    """Yield what is not held out, of documents that are read once or twice."""
    if holdout == "official":
        yield from documents
        return
    if holdout == "documents":
        for text in documents:
            if assign_split(text, holdout_fraction) == "train":
                yield text
        return
    n_train = border(sum(map(len, documents)), holdout_fraction)
    for split, text in split_at(documents, n_train):
        if split == "train":
            yield text
