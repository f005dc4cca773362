"""Writer of one split of a prepared set: a token stream cut into shards."""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.documents import SplitName
from tjx_data.prepared.index import FileEntry, SplitIndex, shard_header


class _HashedFile:
    """New file whose size and SHA-256 are computed while it is written."""

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

    def abort(self) -> None:
        self._stream.close()


class SplitWriter:
    """Write the shards and document positions of one split.

    Parameters
    ----------
    directory : Path
        An existing folder.
    split : {"train", "validation"}
        Prefix of the file names.
    dtype : np.dtype
        Dtype of the stored tokens.
    shard_tokens : int
        Tokens in a full shard.
    eot_id : int or None
        End-of-text token, written before the first document; documents bring the one after them.
    tokenizer_fingerprint : str
        Fingerprint in the headers of the shards.
    """

    def __init__(
        self,
        directory: Path,
        split: SplitName,
        *,
        dtype: np.dtype,
        shard_tokens: int,
        eot_id: int | None,
        tokenizer_fingerprint: str,
    ):
        self._directory = directory
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._eot_id = eot_id
        self._fingerprint = tokenizer_fingerprint
        self._shards: list[FileEntry] = []
        self._starts = _HashedFile(directory / f"{split}_starts.bin")
        self._shard = self._new_shard()
        self.n_tokens = 0
        self.n_documents = 0
        self.n_text_bytes = 0

    def _new_shard(self) -> _HashedFile:
        number = len(self._shards)
        shard = _HashedFile(self._directory / f"{self._split}_{number:05d}.bin")
        shard.write(
            shard_header(
                token_bytes=self._dtype.itemsize,
                first_token=number * self._shard_tokens,
                tokenizer_fingerprint=self._fingerprint,
            )
        )
        return shard

    def add(
        self,
        tokens: npt.NDArray[np.unsignedinteger],
        lengths: npt.NDArray[np.uint64],
        *,
        n_text_bytes: int,
    ) -> None:
        """Append documents.

        Parameters
        ----------
        tokens : uint16 or uint32 [sum of lengths]
            Concatenated documents, each followed by the end-of-text token.
        lengths : uint64 [documents]
            Tokens of each document, end-of-text token included.
        n_text_bytes : int
            Length of their text in UTF-8.
        """
        if not len(lengths):
            return
        if self.n_tokens == 0 and self._eot_id is not None:
            self._write(np.array([self._eot_id], self._dtype))
        starts = np.full(len(lengths), self.n_tokens, "<u8")
        starts[1:] += np.cumsum(lengths[:-1], dtype=np.uint64)
        self._starts.write(starts.tobytes())
        self.n_documents += len(lengths)
        self.n_text_bytes += n_text_bytes
        self._write(tokens)

    def _write(self, tokens: npt.NDArray[np.unsignedinteger]) -> None:
        while len(tokens):
            # A full shard is closed when more tokens follow, so that no shard is empty.
            in_shard = self.n_tokens - len(self._shards) * self._shard_tokens
            if in_shard == self._shard_tokens:
                self._shards.append(self._shard.close())
                self._shard = self._new_shard()
                in_shard = 0
            n_fitting = min(self._shard_tokens - in_shard, len(tokens))
            self._shard.write(tokens[:n_fitting].astype(self._dtype, copy=False).tobytes())
            self.n_tokens += n_fitting
            tokens = tokens[n_fitting:]

    def close(self) -> SplitIndex:
        """Flush all files to disk and return the index of the split."""
        self._shards.append(self._shard.close())
        return SplitIndex(
            n_tokens=self.n_tokens,
            n_documents=self.n_documents,
            n_text_bytes=self.n_text_bytes,
            shards=tuple(self._shards),
            starts=self._starts.close(),
        )

    def abort(self) -> None:
        """Close the files after a failure; the caller removes the folder."""
        self._shard.abort()
        self._starts.abort()
