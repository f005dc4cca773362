"""A corpus: sums of two numbers, a document each."""

from collections.abc import Iterator

from tjx_data import register_corpus


def read() -> Iterator[str]:
    """Yield the documents, the same ones at each call."""
    return (f"{a}+{b}={a + b}" for a in range(100) for b in range(100))


register_corpus(__name__, read, version="1", licence="CC0")
