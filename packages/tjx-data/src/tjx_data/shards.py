"""Writing one split of a prepared set: a stream of tokens, cut into shards."""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from tjx_data.documents import SplitName
from tjx_data.index import FileEntry, SplitIndex


class _HashedFile:
    """A new file that knows its size and hash while it is being written."""

    def __init__(self, path: Path):
        self._path = path
        self._stream: BinaryIO = path.open("xb")
        self._hasher = hashlib.sha256()
        self.n_bytes = 0

    def write(self, content: bytes) -> None:
        self._stream.write(content)
        self._hasher.update(content)
        self.n_bytes += len(content)

    def close(self) -> FileEntry:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return FileEntry(
            name=self._path.name, n_bytes=self.n_bytes, sha256=self._hasher.hexdigest()
        )

    def abandon(self) -> None:
        self._stream.close()


class SplitWriter:
    """Writes one split: its shards, and where its documents start.

    Parameters
    ----------
    directory : Path
        An existing folder.
    split : {"train", "validation"}
        Part of the files' names.
    dtype : np.dtype
        How a token is stored.
    shard_tokens : int
        Tokens in a full shard.
    eot_id : int or None
        The token written before the first document and after each.
    """

    def __init__(
        self,
        directory: Path,
        split: SplitName,
        *,
        dtype: np.dtype,
        shard_tokens: int,
        eot_id: int | None,
    ):
        self._directory = directory
        self._split = split
        self._dtype = dtype
        self._shard_bytes = shard_tokens * dtype.itemsize
        self._eot = b"" if eot_id is None else np.array([eot_id], dtype).tobytes()
        self._shards: list[FileEntry] = []
        self._starts = _HashedFile(directory / f"{split}_starts.bin")
        self._shard = self._new_shard()
        self._inside_document = False
        self.n_tokens = 0
        self.n_documents = 0
        self.n_text_bytes = 0

    def _new_shard(self) -> _HashedFile:
        return _HashedFile(self._directory / f"{self._split}_{len(self._shards):05d}.bin")

    def add(self, ids: npt.ArrayLike, *, n_text_bytes: int, ends_document: bool) -> None:
        """Append the tokens of a document, or of the next piece of one.

        Parameters
        ----------
        ids : array_like of int
            Token ids, each below what `dtype` holds.
        n_text_bytes : int
            Length of the text that they stand for, in UTF-8.
        ends_document : bool
            Whether the document ends with them.
        """
        if not self._inside_document:
            if self.n_tokens == 0:
                self._write(self._eot)
            self._starts.write(np.array([self.n_tokens], "<u8").tobytes())
            self.n_documents += 1
        self._write(np.asarray(ids, self._dtype).tobytes())
        self.n_text_bytes += n_text_bytes
        self._inside_document = not ends_document
        if ends_document:
            self._write(self._eot)

    def _write(self, content: bytes) -> None:
        self.n_tokens += len(content) // self._dtype.itemsize
        while content:
            # A full shard is closed only when more is to come: no shard is ever empty.
            if self._shard.n_bytes == self._shard_bytes:
                self._shards.append(self._shard.close())
                self._shard = self._new_shard()
            n_free = self._shard_bytes - self._shard.n_bytes
            self._shard.write(content[:n_free])
            content = content[n_free:]

    def close(self) -> SplitIndex:
        """Make all files durable and return what was written."""
        assert not self._inside_document
        self._shards.append(self._shard.close())
        return SplitIndex(
            n_tokens=self.n_tokens,
            n_documents=self.n_documents,
            n_text_bytes=self.n_text_bytes,
            shards=tuple(self._shards),
            starts=self._starts.close(),
        )

    def abandon(self) -> None:
        """Close the files after a failure; whoever made the folder removes it."""
        self._shard.abandon()
        self._starts.abandon()
