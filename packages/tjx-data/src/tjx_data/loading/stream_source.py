"""Document sources of a stream: resumable by their own state, or by counting documents."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class StatefulSource(Protocol):
    """Documents with a saved position, such as a streaming `datasets.IterableDataset`."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last document read, as JSON values."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Start the next iteration at a position."""


class CountingSource:
    """Re-readable documents whose position is the number of documents read.

    Resuming reads and skips all documents before the position.

    Parameters
    ----------
    documents : Iterable
        Must give the same documents on every iteration.
    """

    def __init__(self, documents: Iterable[Any]):
        self._documents, self._n_read = documents, 0

    def __iter__(self) -> Iterator[Any]:
        first = self._n_read
        for number, document in enumerate(self._documents):
            if number >= first:
                self._n_read = number + 1
                yield document

    def state_dict(self) -> dict[str, Any]:
        """Return the number of documents read."""
        return {"documents": self._n_read}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Skip the documents of a saved position in the next iteration."""
        self._n_read = state_dict["documents"]


def document_text(document: Any, number: int, field: str) -> str:
    """Return the text of a document that is a string, or a mapping with a text field.

    Parameters
    ----------
    document : str or Mapping
        The document.
    number : int
        Its number for the error message, from 1.
    field : str
        Name of the text field of mappings.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if isinstance(document, Mapping) and field not in document:
        raise ValueError(
            f"field: got {field!r}; expected a field of document {number}: "
            f"{', '.join(map(str, document))}"
        )
    text = document[field] if isinstance(document, Mapping) else document
    if not isinstance(text, str):
        raise ValueError(
            f"documents: got {type(text).__name__} as document {number}; expected strings, or "
            f"mappings with a string under {field!r}"
        )
    return text
