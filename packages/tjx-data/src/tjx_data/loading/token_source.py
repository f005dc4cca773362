"""Sources of a token stream: the interface that `TokenLoader` reads, and prepared sets."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.documents import SplitName
from tjx_data.loading.shard_layout import prepared_layout
from tjx_data.loading.shard_reader import ShardReader, Tokens
from tjx_data.prepared.index import read_index
from tjx_data.prepared.integrity import check_hash, check_hashes, check_shard, check_size
from tjx_data.prepared.packing import Packing, open_packing
from tjx_data.tokenization.tokenizer import Tokenizer


class TokenReader(Protocol):
    """Random access to a token stream; `ShardReader` documents the methods."""

    def windows(self, starts: npt.NDArray[np.int64], width: int) -> Tokens:
        """Return `width` tokens from each start position."""

    def read(self, start: int, length: int) -> Tokens:
        """Return consecutive tokens."""

    def check_unchanged(self) -> None:
        """Check that the tokens did not change."""


def read_chunk(reader: TokenReader, start: int, length: int) -> tuple[Tokens, Tokens]:
    """Return `length` consecutive tokens, and their labels: the next tokens."""
    stream = reader.read(start, length + 1)
    return stream[:-1], stream[1:]


class TokenSource(ABC):
    """A stream of token ids with random access.

    Attributes
    ----------
    name : str
        Name in error messages.
    reader : TokenReader
        Reads the tokens, and raises `DataError` for ids beyond the vocabulary.
    n_tokens : int
        Length of the stream.
    """

    name: str
    reader: TokenReader
    n_tokens: int

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, str]:
        """Everything that determines the tokens, by name, with ``tokens``: their hash."""

    @abstractmethod
    def verify(self) -> None:
        """Raise `DataError` if the stored tokens differ from their recorded hash."""

    @property
    def n_documents(self) -> int:
        """Number of documents; raises ValueError if document borders are unknown."""
        raise self._no_documents("n_documents")

    @property
    def n_text_bytes(self) -> int:
        """Bytes of UTF-8 text; raises ValueError if the text is unknown."""
        raise self._no_documents("n_text_bytes")

    def packing(self, seq_len: int) -> Packing:
        """Return the packing of whole documents into rows, if document borders are known."""
        assert seq_len
        raise self._no_documents("packing")

    def document(self, number: int) -> Tokens:
        """Return the tokens of a document, if document borders are known."""
        assert number >= 0
        raise self._no_documents("document")

    def _no_documents(self, argument: str) -> ValueError:
        return ValueError(
            f"{argument}: got {self.name}, tokens without document borders; expected a prepared "
            "set; use packing='windows', or prepare the text with tjx_data.prepare"
        )


class PreparedSplit(TokenSource):
    """One split of a prepared set.

    Parameters
    ----------
    directory : str or Path
        The set.
    split : {"train", "validation"}
        The split.
    tokenizer : Tokenizer or None
        The tokenizer that the caller will use; it must have made the set.

    Raises
    ------
    ValueError
        If the set is damaged, or made with another tokenizer.
    """

    def __init__(
        self, directory: str | Path, split: SplitName, tokenizer: Tokenizer | None
    ) -> None:
        self.directory = Path(directory)
        self.index = read_index(directory)
        self.name = f"the {split} split of {self.directory}"
        self._split_name, self._split = split, self.index.splits[split]
        self.n_tokens = self._split.n_tokens
        self._check_files(tokenizer)
        self.reader = ShardReader(self.directory, prepared_layout(self.index, split))

    @property
    def n_documents(self) -> int:
        """Number of documents in the split."""
        return self._split.n_documents

    @property
    def n_text_bytes(self) -> int:
        """Bytes of UTF-8 text in the split."""
        return self._split.n_text_bytes

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """Hash of the tokens, and fingerprint of the tokenizer."""
        hashes = "".join(shard.sha256 for shard in self._split.shards)
        return {
            "tokens": hashlib.sha256(hashes.encode()).hexdigest(),
            "tokenizer": self.index.tokenizer_fingerprint,
        }

    def packing(self, seq_len: int) -> Packing:
        """Return the packing of whole documents into rows."""
        return open_packing(self.directory, self._split_name, seq_len)

    def document(self, number: int) -> Tokens:
        """Return the tokens of a document, without end-of-text tokens."""
        if not 0 <= number < self.n_documents:
            raise ValueError(
                f"number: got {number}; expected a document, 0 to {self.n_documents - 1}"
            )
        file = self.directory / self._split.starts.name
        bounds = [*np.fromfile(file, "<u8", 2, offset=8 * number).tolist(), self.n_tokens]
        start, end = bounds[:2]
        end -= 0 if self.index.eot_id is None else 1
        if not 0 <= start <= end < self.n_tokens:
            check_hash(self.directory, self._split.starts)
        return self.reader.read(start, end - start)

    def verify(self) -> None:
        """Compare the SHA-256 of every file of the split with the index."""
        check_hashes(self.directory, self.index.files(self._split_name))

    def _check_files(self, tokenizer: Tokenizer | None) -> None:
        for number in range(len(self._split.shards)):
            check_shard(self.directory, self.index, self._split_name, number)
        check_size(self.directory, self._split.starts)
        check_hash(self.directory, self.index.tokenizer)
        if tokenizer is not None and tokenizer.fingerprint != self.index.tokenizer_fingerprint:
            raise ValueError(
                f"tokenizer: got {tokenizer.fingerprint[:16]} ({tokenizer.vocab_size} tokens); "
                f"expected the tokenizer that made {self.directory}, "
                f"{self.index.tokenizer_fingerprint[:16]} ({self.index.vocab_size} tokens); load "
                "it from that folder, or prepare the data again"
            )
