"""Reader of a token stream from its files, with a named error for damaged files.

Shards are read with ``pread``, not memory-mapped: access to a truncated or failing mapped file
kills the process with SIGBUS, without an error message.
"""

import os
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tjx_data.errors import DataError
from tjx_data.loading.shard_layout import ShardLayout
from tjx_data.prepared.index import FileEntry
from tjx_data.prepared.integrity import check_hash, check_size

Tokens = npt.NDArray[np.unsignedinteger]

_CHECK_INTERVAL = 1.0  # seconds between two checks that the shards are unchanged


class _FileStatus(NamedTuple):
    """Properties that change when a file is written or replaced."""

    size: int
    mtime_ns: int
    device: int
    inode: int


class ShardReader:
    """Random access to a token stream in files.

    Parameters
    ----------
    directory : Path
        Folder of the files.
    layout : ShardLayout
        The files.

    Raises
    ------
    DataError
        If a shard cannot be opened.
    """

    def __init__(self, directory: Path, layout: ShardLayout) -> None:
        self._directory, self._layout = directory, layout
        self.dtype = layout.dtype
        self._entries = layout.files
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        for entry in self._entries:
            self._files.append(self._open(entry))
        self._statuses = [self._status(entry) for entry in self._entries]
        self._next_check = time.monotonic() + _CHECK_INTERVAL

    def windows(self, starts: npt.NDArray[np.int64], width: int) -> Tokens:
        """Return `width` tokens from each start position of the stream, [R, width].

        Parameters
        ----------
        starts : int64 [R]
            Positions in the stream.
        width : int
            Tokens per window.

        Raises
        ------
        DataError
            If a shard is unreadable or holds an id beyond the vocabulary; the message names it.
        """
        size = width * self.dtype.itemsize
        numbers, local = np.divmod(starts, self._layout.shard_tokens)
        if (local + width <= self._layout.shard_tokens).all():
            offsets = self._layout.header_bytes + local * self.dtype.itemsize
            files, pread = self._files, os.pread
            try:
                content = b"".join([
                    pread(files[number], size, offset)
                    for number, offset in zip(numbers.tolist(), offsets.tolist(), strict=True)
                ])  # fmt: skip
            except OSError:
                content = b""  # the slow path below names the file
            if len(content) == size * len(starts):
                windows = np.frombuffer(content, self.dtype).reshape(len(starts), width)
                if windows.max() < self._layout.vocab_size:
                    return windows
        return np.stack([self.read(start, width) for start in starts.tolist()])

    def read(self, start: int, length: int) -> Tokens:
        """Return tokens ``start`` to ``start + length - 1`` of the stream, across shards.

        Raises
        ------
        DataError
            If a shard is unreadable or holds an id beyond the vocabulary; the message names it.
        """
        assert 0 <= start <= start + length <= self._layout.n_tokens
        parts = []
        while length > 0:
            number, local = divmod(start, self._layout.shard_tokens)
            part = self._read_shard(number, local, min(length, self._layout.shard_tokens - local))
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, self.dtype)])

    def check_unchanged(self) -> None:
        """Check, at most once a second, that no shard changed since it was opened.

        A shard that was replaced by a file with the right hash, such as a restored copy, is opened
        again.

        Raises
        ------
        DataError
            If a shard is missing or has other content; the message names it.
        """
        now = time.monotonic()
        if now < self._next_check:
            return
        for number, entry in enumerate(self._entries):
            if (status := self._status(entry)) != self._statuses[number]:
                check_hash(self._directory, entry, fix=self._layout.fix)
                os.close(self._files[number])
                self._files[number] = self._open(entry)
                self._statuses[number] = status
        self._next_check = now + _CHECK_INTERVAL

    def _read_shard(self, number: int, local: int, length: int) -> Tokens:
        """Return `length` tokens of one shard from position `local` in it."""
        file = self._directory / self._entries[number].name
        offset = self._layout.header_bytes + local * self.dtype.itemsize
        size = length * self.dtype.itemsize
        parts: list[bytes] = []
        while size > 0:  # one call reads at most 2 GiB
            try:
                part = os.pread(self._files[number], size, offset)
            except OSError as error:
                raise DataError(
                    f"{file}: cannot be read at byte {offset} ({error.strerror}); check its disk"
                ) from error
            if not part:
                # Its message is better.
                check_size(self._directory, self._entries[number], fix=self._layout.fix)
                raise DataError(f"{file}: ends at byte {offset}; {self._layout.fix}")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        tokens = np.frombuffer(b"".join(parts), self.dtype)
        if (largest := int(tokens.max())) >= self._layout.vocab_size:
            raise DataError(
                f"{file}: got token id {largest} between positions {local} and {local + length}; "
                f"expected ids below {self._layout.vocab_size}; the file is damaged: "
                f"{self._layout.fix}"
            )
        return tokens

    def _open(self, entry: FileEntry) -> int:
        file = self._directory / entry.name
        try:
            return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{file}: cannot be opened ({error.strerror})") from error

    def _status(self, entry: FileEntry) -> _FileStatus | None:
        """Return the status of the file that has the shard's name now, or None without one."""
        try:
            status = (self._directory / entry.name).stat()
        except OSError:  # the check that follows raises the error
            return None
        return _FileStatus(status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
