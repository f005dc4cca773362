"""Checksums of checkpoint files: xxh3, 128 bits, hexadecimal.

They detect accidental damage. They do not detect forgery, since a forger can also replace them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xxhash

Digest = xxhash.xxh3_128
"""Incremental hash with ``update`` and ``hexdigest``."""

CHUNK_BYTES = 8 << 20


def checksum(data: Any) -> str:
    """Return the checksum of bytes or of an object with the buffer protocol."""
    return Digest(data).hexdigest()


def chunks(data: memoryview) -> Iterator[memoryview]:
    """Split memory into chunks of about the size of a CPU cache."""
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def checksum_of_range(read_into: Callable[[int, memoryview], None], offset: int, size: int) -> str:
    """Return the checksum of a range of a file in constant memory.

    Parameters
    ----------
    read_into
        Fills a buffer from an offset of the file.
    offset, size
        The range in bytes.
    """
    digest = Digest()
    buffer = memoryview(np.empty(min(size, CHUNK_BYTES), np.uint8).data)
    for start in range(offset, offset + size, CHUNK_BYTES):
        part = buffer[: min(CHUNK_BYTES, offset + size - start)]
        read_into(start, part)
        digest.update(part)
    return digest.hexdigest()
