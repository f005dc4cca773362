"""The shards of a split as one stream of tokens, read so that damage is an error with a name.

Shards are read, not mapped: a mapped file that is cut short, or whose disk fails, kills the process
with SIGBUS at the next access, and nothing can be said about it.
"""

import os
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tjx_data.corpora.documents import SplitName
from tjx_data.errors import DataError
from tjx_data.prepared.index import HEADER_BYTES, FileEntry, Index, check_hash, check_size

Tokens = npt.NDArray[np.unsignedinteger]

_LOOK_EVERY = 1.0  # seconds between two looks whether the shards are still what they were


class _Stamp(NamedTuple):
    """What changes when somebody writes to a file or puts another in its place."""

    size: int
    modified: int
    device: int
    inode: int


class ShardReader:
    """The stream of a split.

    Parameters
    ----------
    directory : Path
        A prepared set.
    index : Index
        Its index.
    split : {"train", "validation"}
        Which part of it.

    Raises
    ------
    DataError
        If a shard cannot be opened.
    """

    def __init__(self, directory: Path, index: Index, split: SplitName) -> None:
        self._directory, self._index = directory, index
        self._n_tokens = index.splits[split].n_tokens
        self.dtype = np.dtype(index.dtype).newbyteorder("<")
        self._entries = index.splits[split].shards
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        for entry in self._entries:
            self._files.append(self._open(entry))
        self._stamps = [self._stamp(entry) for entry in self._entries]
        self._look_again = time.monotonic() + _LOOK_EVERY

    def windows(self, starts: npt.NDArray[np.int64], width: int) -> Tokens:
        """Return `width` tokens from each of some positions of the stream, [positions, width].

        Raises
        ------
        DataError
            Naming the shard that cannot be read or holds what no token is.
        """
        size = width * self.dtype.itemsize
        numbers, local = np.divmod(starts, self._index.shard_tokens)
        if (local + width <= self._index.shard_tokens).all():
            offsets = HEADER_BYTES + local * self.dtype.itemsize
            files, pread = self._files, os.pread
            try:
                read = b"".join([
                    pread(files[number], size, offset)
                    for number, offset in zip(numbers.tolist(), offsets.tolist(), strict=True)
                ])  # fmt: skip
            except OSError:
                read = b""  # told below, where one knows of which file
            if len(read) == size * len(starts):
                windows = np.frombuffer(read, self.dtype).reshape(len(starts), width)
                if windows.max() < self._index.vocab_size:
                    return windows
        return np.stack([self.read(start, width) for start in starts.tolist()])

    def read(self, start: int, length: int) -> Tokens:
        """Return `length` tokens of the stream from a position, across shards.

        Raises
        ------
        DataError
            Naming the shard that cannot be read or holds what no token is.
        """
        assert 0 <= start <= start + length <= self._n_tokens
        pieces = []
        while length > 0:
            number, local = divmod(start, self._index.shard_tokens)
            piece = self._read_piece(number, local, min(length, self._index.shard_tokens - local))
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.empty(0, self.dtype)])

    def look(self) -> None:
        """Refuse to go on with shards that were changed since they were opened.

        It looks once a second at most. A file that was changed and is what the index says, such as
        one that was copied back, is opened again.

        Raises
        ------
        DataError
            Naming the file.
        """
        now = time.monotonic()
        if now < self._look_again:
            return
        for number, entry in enumerate(self._entries):
            if (found := self._stamp(entry)) != self._stamps[number]:
                check_hash(self._directory, entry)
                os.close(self._files[number])
                self._files[number] = self._open(entry)
                self._stamps[number] = found
        self._look_again = now + _LOOK_EVERY

    def _read_piece(self, number: int, local: int, length: int) -> Tokens:
        """Read tokens of one shard."""
        file = self._directory / self._entries[number].name
        offset = HEADER_BYTES + local * self.dtype.itemsize
        size = length * self.dtype.itemsize
        parts: list[bytes] = []
        while size > 0:  # one call reads 2 GiB at most
            try:
                part = os.pread(self._files[number], size, offset)
            except OSError as error:
                raise DataError(
                    f"{file}: cannot be read at byte {offset} ({error.strerror}); is its disk "
                    "still there?"
                ) from error
            if not part:
                check_size(self._directory, self._entries[number])  # it says more
                raise DataError(f"{file}: ends at byte {offset}; prepare the data again")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        tokens = np.frombuffer(b"".join(parts), self.dtype)
        if (found := int(tokens.max())) >= self._index.vocab_size:
            raise DataError(
                f"{file}: holds {found} where tokens are below {self._index.vocab_size}, between "
                f"{local} and {local + length} of it; it is damaged: prepare the data again"
            )
        return tokens

    def _open(self, entry: FileEntry) -> int:
        file = self._directory / entry.name
        try:
            return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{file}: cannot be opened ({error.strerror})") from error

    def _stamp(self, entry: FileEntry) -> _Stamp | None:
        """Look at the file that has the name now; None where there is none."""
        try:
            status = (self._directory / entry.name).stat()
        except OSError:  # whatever is asked of it next says why
            return None
        return _Stamp(status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
