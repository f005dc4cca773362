"""Parts of a corpus with fewer documents: a subset by hash, or the first ones."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tjx_core import ConfigError
from tjx_data.corpora.documents import Documents, Malformed, Part, is_empty


def in_subset(text: str, fraction: float) -> bool:
    """Return whether a document belongs to the subset of a fraction of a corpus.

    The choice is by the hash of the document, independent of the holdout's. A smaller subset is
    part of every larger one.
    """
    # The first 8 bytes of this hash determine the holdout.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[8:16], "big") < fraction * 2**64


def limit_documents(
    documents: Documents, *, subset: float = 1.0, max_documents: int | None = None
) -> Documents:
    """Return a part of a corpus; its official validation split stays whole.

    Parameters
    ----------
    documents : Documents
        The corpus.
    subset : float
        Probability of each document to be kept, by `in_subset`.
    max_documents : int or None
        The first documents of the subset are kept, at most this many; those of white space only do
        not count. They are read in this process to count them.

    Returns
    -------
    Documents
        The remaining documents.

    Raises
    ------
    ValueError
        If an argument is invalid.

    Examples
    --------
    >>> letters = Documents.of(lambda: ["a", "b", "c"], {"corpus": "letters"})
    >>> list(limit_documents(letters, max_documents=2))
    ['a', 'b']
    """
    problems = []
    if not 0 < subset <= 1:
        problems.append(f"subset: got {subset}; expected above 0 and at most 1, such as 0.01")
    if max_documents is not None and max_documents < 1:
        problems.append(f"max_documents: got {max_documents}; expected at least 1")
    if problems:
        raise ConfigError(problems)
    source, n_bytes = dict(documents.source), documents.n_bytes
    if subset < 1:
        source["subset"] = repr(subset)
        n_bytes = None if n_bytes is None else int(n_bytes * subset)
    if max_documents is not None:
        source["max_documents"] = str(max_documents)
        n_bytes = None

    def parts() -> Iterable[Part]:
        found: Iterable[Part] = documents.parts()
        if subset < 1:
            found = (SubsetPart(part, subset) for part in found)
        return found if max_documents is None else _first(found, max_documents)

    return Documents(source, parts, n_bytes, documents.held_out)


@dataclass(frozen=True)
class SubsetPart:
    """The documents of a part that belong to a subset; malformed records stay.

    Attributes
    ----------
    part : Part
        The part.
    fraction : float
        As of `in_subset`.
    """

    part: Part
    fraction: float

    @property
    def identity(self) -> str:
        """A string that differs for parts with other documents."""
        return f"{self.part.identity} subset {self.fraction!r}"

    def read(self) -> Iterator[str | Malformed]:
        """Yield the documents."""
        for document in self.part.read():
            if not isinstance(document, str) or in_subset(document, self.fraction):
                yield document


@dataclass(frozen=True)
class FirstPart:
    """The first documents of a part.

    Attributes
    ----------
    part : Part
        The part.
    count : int
        Number of documents that are not empty.
    """

    part: Part
    count: int

    @property
    def identity(self) -> str:
        """A string that differs for parts with other documents."""
        return f"{self.part.identity} first {self.count}"

    def read(self) -> Iterator[str | Malformed]:
        """Yield the documents."""
        left = self.count
        for document in self.part.read():
            yield document
            left -= isinstance(document, str) and not is_empty(document)
            if not left:
                return


def _first(parts: Iterable[Part], count: int) -> Iterator[Part]:
    """Yield parts up to the part with the document number `count`, which is cut."""
    for part in parts:
        found = sum(isinstance(text, str) and not is_empty(text) for text in part.read())
        if found >= count:
            yield FirstPart(part, count)
            return
        yield part
        count -= found
