"""Reading of plain, gzip and zstd files as blocks of unpacked bytes."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tjx_data.bounded_io import check_unpacked

BLOCK_BYTES = 1 << 20
ZSTD_INPUT_BYTES = 1 << 12
"""Packed bytes unpacked at once; they expand to at most 128 MiB in memory."""

Compression = Literal["none", "gzip", "zstd"]


def read_blocks(
    file: Path, compression: Compression, start: int = 0, end: int | None = None
) -> Iterator[bytes]:
    """Yield the unpacked bytes of a file in blocks.

    Parameters
    ----------
    file : Path
        The file.
    compression : {"none", "gzip", "zstd"}
        Its compression.
    start, end : int
        Range of bytes to read; supported without compression only. None reads to the end.

    Yields
    ------
    bytes

    Raises
    ------
    ValueError
        If the file is unreadable, damaged, truncated or a decompression bomb, or unpacking needs an
        extra.
    """
    assert compression == "none" or (start == 0 and end is None)
    try:
        with file.open("rb") as stream:
            if compression == "none":
                yield from _plain(file, stream, start, end)
                return
            n_packed, n_unpacked = file.stat().st_size, 0
            for block in _gunzip(stream) if compression == "gzip" else _unzstd(file, stream):
                n_unpacked += len(block)
                check_unpacked(file, n_unpacked, n_packed)
                yield block
    except EOFError as error:
        raise ValueError(_truncated(file)) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: not gzip, or damaged: {error}") from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}") from error


def _truncated(file: Path) -> str:
    return f"{file}: truncated; download or pack it again"


def _plain(file: Path, stream: BinaryIO, start: int, end: int | None) -> Iterator[bytes]:
    stream.seek(start)
    left = end - start if end is not None else None
    while left is None or left > 0:
        block = stream.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left))
        if not block:
            break
        yield block
        left = None if left is None else left - len(block)
    if left:
        raise ValueError(_truncated(file))


def _gunzip(stream: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=stream) as unpacked:
        while block := unpacked.read(BLOCK_BYTES):
            yield block


def _unzstd(file: Path, stream: BinaryIO) -> Iterator[bytes]:
    """Unpack frame by frame, since the library's own reader accepts a truncated frame."""
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"{file}: reading zstd needs: pip install 'tjx-data[zstd]'") from error
    # Files packed with --long need windows of up to 2 GiB.
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame: Any = None
    try:
        while packed := stream.read(ZSTD_INPUT_BYTES):
            while packed:
                frame = frame or unpacker.decompressobj()
                if block := frame.decompress(packed):
                    yield block
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise ValueError(f"{file}: not zstd, or damaged: {error}") from error
    if frame is not None:
        raise ValueError(_truncated(file))
