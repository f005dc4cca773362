"""Reading of arrays from checkpoint files, with verification of every byte."""

import contextlib
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from tjx_ckpt.store.checksum import Digest, chunks
from tjx_ckpt.store.manifest import Manifest
from tjx_ckpt.store.storage import FileReader, Storage, WrongFileError
from tjx_ckpt.store.tensor_file import StoredPiece
from tjx_ckpt.store.verification import DamagedError, check_header, describe_error

# XLA uses host memory with this alignment on CPU devices without a copy.
_ALIGNMENT = 64


class Box(NamedTuple):
    """A box of an array: its start indices and its shape."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def overlap(self, other: "Box") -> tuple[slice, ...] | None:
        """Return the slices of this box that overlap another, or None."""
        slices = []
        for mine, size, theirs, their_size in zip(
            self.start, self.shape, other.start, other.shape, strict=True
        ):
            first, last = max(mine, theirs), min(mine + size, theirs + their_size)
            if first >= last:
                return None
            slices.append(slice(first - mine, last - mine))
        return tuple(slices)


class CheckpointReader:
    """Reads arrays of one checkpoint; a thread-safe context manager.

    Checksums are computed of the memory that is returned, so that no byte is read twice.

    Parameters
    ----------
    storage, step, manifest
        The directory, the step and its manifest.
    """

    def __init__(self, storage: Storage, step: int, manifest: Manifest) -> None:
        self.manifest = manifest
        self._storage, self._step = storage, step
        self._files: dict[str, FileReader] = {}
        self._opening = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._places: dict[str, list[tuple[str, StoredPiece]]] = {}
        for name, file in manifest.files.items():
            for stored in file.pieces:
                self._places.setdefault(stored.piece.key, []).append((name, stored))

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def leaf(self, key: str) -> np.ndarray:
        """Read and verify a whole leaf.

        Raises
        ------
        DamagedError
            If the content of a file differs from what was saved.
        UnreadableError
            If a file cannot be read now.
        """
        shape = self.manifest.leaves[key].shape
        (array,) = self.boxes(key, [Box((0,) * len(shape), shape)])
        return array

    def boxes(self, key: str, boxes: Iterable[Box]) -> list[np.ndarray]:
        """Read and verify boxes of a leaf; each stored piece is read at most once.

        Raises
        ------
        DamagedError
            If the content of a file differs from what was saved.
        """
        wanted = list(boxes)
        dtype = np.dtype(self.manifest.leaves[key].dtype)
        results: list[np.ndarray | None] = [None] * len(wanted)
        for name, stored in self._places.get(key, ()):
            here = Box(stored.piece.start, stored.piece.shape)
            if not any(box.overlap(here) is not None for box in wanted):
                continue
            content = self._read(name, stored).view(dtype).reshape(here.shape)
            for place, box in enumerate(wanted):
                if (mine := box.overlap(here)) is None:
                    continue
                part = _slice(content, here.overlap(box) or ())
                if part.shape == box.shape:
                    results[place] = part
                    continue
                if (result := results[place]) is None:
                    result = results[place] = aligned_empty(box.shape, dtype)
                _slice(result, mine)[...] = part
        # Empty leaves have no pieces.
        return [
            np.empty(box.shape, dtype) if result is None else result
            for box, result in zip(wanted, results, strict=True)
        ]

    def _read(self, name: str, stored: StoredPiece) -> np.ndarray:
        digest = Digest()
        try:
            file = self._open(name)  # checks its size before memory is allocated
            content = aligned_empty((stored.size,), np.dtype(np.uint8))
            position = stored.offset
            for chunk in chunks(memoryview(content.data)):
                file.read_into(position, chunk)
                digest.update(chunk)
                position += len(chunk)
        except (FileNotFoundError, WrongFileError) as error:
            raise DamagedError(describe_error(name, error)) from None
        if digest.hexdigest() != stored.xxh3_128:
            raise DamagedError(f"{name}: the checksum differs ({stored.piece.key})")
        return content

    def _open(self, name: str) -> FileReader:
        with self._opening:
            if name not in self._files:
                file = self._stack.enter_context(self._storage.open(self._step, name))
                check_header(name, file, self.manifest.files[name])
                self._files[name] = file
            return self._files[name]


def _slice(array: np.ndarray, where: tuple[slice, ...]) -> np.ndarray:
    """Return a view; without the ellipsis a 0-d array would become a scalar."""
    index: Any = (*where, ...)
    view: np.ndarray = array[index]
    return view


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialized array that starts at a multiple of 64 bytes."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)
