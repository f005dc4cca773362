"""Where a stream of documents comes from: something that knows its place, or that counts."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class StatefulSource(Protocol):
    """Documents that know where they are: after `load_state_dict`, the next pass begins there."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]:
        """Return the place after the document that was read last, in JSON."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Begin the next pass at a place."""


class CountingSource:
    """Documents that can be read again and again, with the number read as their state.

    To go on at a place is to read all that stands before it.
    """

    def __init__(self, documents: Iterable[Any]):
        self._documents, self._done = documents, 0

    def __iter__(self) -> Iterator[Any]:
        begin = self._done
        for number, document in enumerate(self._documents):
            if number >= begin:
                self._done = number + 1
                yield document

    def state_dict(self) -> dict[str, Any]:
        """Return the number of documents that were read."""
        return {"documents": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Skip so many documents in the next pass."""
        self._done = state_dict["documents"]


def document_text(document: Any, number: int, field: str) -> str:
    """Return the text of a document, which is a string, or a mapping with one.

    Raises
    ------
    ValueError
        If it is neither; it is called by its number, from 1.
    """
    if isinstance(document, Mapping) and field not in document:
        raise ValueError(
            f"document {number} has no field {field!r}; it has "
            f"{', '.join(map(str, document))}: name one with field="
        )
    text = document[field] if isinstance(document, Mapping) else document
    if not isinstance(text, str):
        raise ValueError(
            f"document {number} is of type {type(text).__name__}; documents are strings, or "
            f"mappings with a string under {field!r}"
        )
    return text
