"""The checksum of everything that a checkpoint holds: xxh3, 128 bits, hexadecimal.

It finds accidents, not forgery: whoever can write the folder can write the checksums.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xxhash

Digest = xxhash.xxh3_128
"""Takes bytes piece by piece (``update``) and gives the checksum (``hexdigest``)."""

CHUNK_BYTES = 8 << 20


def checksum(data: Any) -> str:
    """Return the checksum of bytes, or of anything that gives its memory."""
    return Digest(data).hexdigest()


def chunks(data: memoryview) -> Iterator[memoryview]:
    """Cut memory in pieces that fit a processor's cache, or nearly."""
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def checksum_of_range(read_into: Callable[[int, memoryview], None], offset: int, size: int) -> str:
    """Return the checksum of a range of a file in constant memory.

    Parameters
    ----------
    read_into
        Fills a buffer from an offset of the file.
    offset, size
        The range, bytes.
    """
    digest = Digest()
    buffer = memoryview(np.empty(min(size, CHUNK_BYTES), np.uint8).data)
    for start in range(offset, offset + size, CHUNK_BYTES):
        part = buffer[: min(CHUNK_BYTES, offset + size - start)]
        read_into(start, part)
        digest.update(part)
    return digest.hexdigest()
