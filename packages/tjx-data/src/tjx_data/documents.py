"""A corpus seen as documents: a source that can be read again and again, and its two halves."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Holdout = Literal["documents", "tail"]
SplitName = Literal["train", "validation"]

# Called as progress(stage, done, total): what is being done, bytes of text done so far, and how
# many there are in all where that is known.
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Documents:
    """Documents that can be read more than once, with a description of where they come from.

    Attributes
    ----------
    source : Mapping[str, str]
        Where the text comes from; it is kept in the index of what is prepared from it.
    read : Callable[[], Iterable[str]]
        Starts a new pass over the documents, always the same ones in the same order.

    Examples
    --------
    >>> two = Documents({"corpus": "two"}, lambda: ["one text", "another"])
    >>> list(two) == list(two)
    True
    """

    source: Mapping[str, str]
    read: Callable[[], Iterable[str]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.read())


def is_empty(text: str) -> bool:
    """Tell whether a document holds nothing but white space."""
    return not text or text.isspace()


def split_documents(
    documents: Iterable[str], holdout: Holdout, holdout_fraction: float
) -> Iterator[tuple[SplitName, str]]:
    """Assign each document to the training or the validation split.

    Parameters
    ----------
    documents : Iterable[str]
        Read once for ``"documents"``, twice for ``"tail"``.
    holdout : {"documents", "tail"}
        ``"documents"``: by the hash of the document, so that equal documents share a side and
        the order of the corpus does not matter. ``"tail"``: the last characters of the whole
        text, as nanoGPT splits one long text; a document that the border crosses is cut in two.
    holdout_fraction : float
        The share of the documents or of the characters that is held out.

    Yields
    ------
    tuple[str, str]
        The split's name and the text, in the order of the corpus.

    Raises
    ------
    ValueError
        If ``"tail"`` is asked for and the documents can be read only once.
    """
    if holdout == "documents":
        for text in documents:
            yield _split_by_hash(text, holdout_fraction), text
        return
    if iter(documents) is documents:
        raise ValueError(
            "holdout='tail' reads the documents twice, to count their characters first: "
            f"give a list or a tjx_data.Documents, not a {type(documents).__name__}"
        )
    # nanoGPT writes data[:int(n * 0.9)]; the same expression gives the same border.
    n_left = int(sum(len(text) for text in documents) * (1 - holdout_fraction))
    for text in documents:
        head, tail = text[:n_left], text[n_left:]
        n_left -= len(head)
        if head or not text:
            yield "train", head
        if tail:
            yield "validation", tail


def _split_by_hash(text: str, holdout_fraction: float) -> SplitName:
    # A document with lone surrogates still has a side; the tokenizer says what is wrong with it.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    number = int.from_bytes(digest[:8], "big")
    return "validation" if number < holdout_fraction * 2**64 else "train"
