"""Scan of corpus files: text check, hash, and byte ranges of parts.

Scans of large files are cached in the user's cache folder, so that an unchanged file is read once.
"""

import codecs
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tjx_core import write_atomically
from tjx_data.cache import default_cache_dir
from tjx_data.corpora.decompression import read_blocks
from tjx_data.corpora.documents import is_empty
from tjx_data.corpora.formats import SEPARATOR_BYTES, Format

PART_BYTES = 1 << 21
"""Approximate size of a part."""
MIN_CACHED_BYTES = 1 << 20
"""Smaller files are scanned again: that is faster than the cache."""
SETTLED_NS = 2 * 10**9
"""Age of a file from which its scan is cached: a later change is visible in its time stamp."""
VERSION = 1
"""Version of cached scans."""

_log = logging.getLogger(__name__)


class FileStamp(NamedTuple):
    """Properties that change when a file changes."""

    size: int
    mtime_ns: int
    inode: int


class ByteRange(NamedTuple):
    """Bytes of a file that hold whole documents.

    Attributes
    ----------
    start, end : int
        First byte, and the one after the last.
    first_line : int
        Number of the first line in the file, from 1; for JSON lines only.
    """

    start: int
    end: int
    first_line: int


@dataclass(frozen=True)
class FileScan:
    """Result of a scan.

    Attributes
    ----------
    sha256 : str
        Hash of the unpacked bytes.
    n_bytes : int
        Number of unpacked bytes.
    byte_ranges : tuple[ByteRange, ...]
        Ranges of the parts in order; one for a file that cannot be cut.
    """

    sha256: str
    n_bytes: int
    byte_ranges: tuple[ByteRange, ...]


class NoTextError(ValueError):
    """A file is valid and holds no text."""


def file_stamp(file: Path) -> FileStamp:
    """Return the stamp of a file.

    Raises
    ------
    ValueError
        If the file is missing or inaccessible.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    return FileStamp(status.st_size, status.st_mtime_ns, status.st_ino)


def check_unchanged(file: Path, stamp: FileStamp) -> None:
    """Check that a file still has the size and time of a stamp.

    Raises
    ------
    ValueError
        If it changed.
    """
    now = file_stamp(file)  # the inode can differ on another machine
    if (now.size, now.mtime_ns) != (stamp.size, stamp.mtime_ns):
        raise ValueError(f"{file}: changed since the scan; start again")


def scan(file: Path, form: Format) -> tuple[FileScan, FileStamp]:
    """Scan a file in bounded memory, or return its cached scan.

    Parameters
    ----------
    file : Path
        The file.
    form : Format
        Its format.

    Returns
    -------
    tuple
        The scan, and the stamp of the file that was scanned.

    Raises
    ------
    ValueError
        If the file is unreadable or damaged, changes during the scan, or is text that is not UTF-8.
    NoTextError
        If it is empty or consists of white space.
    """
    before = file_stamp(file)
    cache_file = scan_cache_file(file, *form, str(PART_BYTES), str(VERSION))
    if found := _load_cached(cache_file, before):
        return found, before
    found = _scan(file, form)
    if file_stamp(file) != before:
        raise ValueError(f"{file}: changed during the scan; wait until it is complete")
    _save_cached(cache_file, found, before)
    return found, before


def _load_cached(cache_file: Path, stamp: FileStamp) -> FileScan | None:
    """Return a cached scan if it is intact and the file is unchanged."""
    found = load_cached(cache_file, stamp)
    try:
        if found is None:
            return None
        byte_ranges = tuple(ByteRange(*byte_range) for byte_range in found["stretches"])
        return FileScan(found["sha256"], found["n_bytes"], byte_ranges)
    except (LookupError, TypeError):
        return None  # of another version: the file is scanned again


def _save_cached(cache_file: Path, found: FileScan, stamp: FileStamp) -> None:
    fields = asdict(found)
    fields["stretches"] = fields.pop("byte_ranges")  # name in the files of version 1
    save_cached(cache_file, fields, stamp)


def load_cached(cache_file: Path, stamp: FileStamp) -> dict[str, Any] | None:
    """Return the fields that `save_cached` stored, if they are intact and of this stamp."""
    try:
        content = json.loads(cache_file.read_bytes())
        digest = content.pop("digest")
        if content["stamp"] != list(stamp) or digest != _digest(content):
            return None
        fields: dict[str, Any] = content["scan"]
        return fields
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # missing or damaged: the file is scanned again


def save_cached(cache_file: Path, fields: Mapping[str, Any], stamp: FileStamp) -> None:
    """Store the result of a scan, if the file is large and its stamp is old enough to trust."""
    settled = time.time_ns() - stamp.mtime_ns > SETTLED_NS
    if not settled or stamp.size < MIN_CACHED_BYTES:
        return
    content = {"scan": dict(fields), "stamp": list(stamp)}
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache_file, json.dumps({**content, "digest": _digest(content)}))
    except OSError as error:
        _log.warning("%s: cannot cache the scan of a file: %s", cache_file, error.strerror)


def scan_cache_file(file: Path, *settings: str) -> Path:
    """Return the file that caches a scan of `file` with some settings."""
    key = "\n".join([str(file.absolute()), *settings])
    name = hashlib.sha256(os.fsencode(key)).hexdigest()
    return default_cache_dir() / "scans" / f"{name[:32]}.json"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _scan(file: Path, form: Format) -> FileScan:
    hasher = hashlib.sha256()
    check = _Utf8Check(file) if form.kind == "text" else None
    cutter = _PartCutter(form)
    has_text = False
    for block in read_blocks(file, form.compression):
        hasher.update(block)
        if check is not None:
            has_text |= check.add(block)
        else:
            has_text = has_text or not block.isspace()
        cutter.add(block)
    if check is not None:
        check.finish()
    if not has_text:
        reason = "holds only white space" if cutter.n_bytes else "is empty"
        raise NoTextError(f"{file}: {reason}; expected text")
    return FileScan(hasher.hexdigest(), cutter.n_bytes, tuple(cutter.byte_ranges()))


class _Utf8Check:
    """Check that the blocks of a file are UTF-8."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._n_bytes = 0

    def add(self, block: bytes, *, final: bool = False) -> bool:
        """Check a block; return whether it holds more than white space."""
        n_pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(block, final=final)
        except UnicodeDecodeError as error:
            byte = self._n_bytes - n_pending + error.start
            raise ValueError(
                f"{self._file}: not UTF-8 text at byte {byte} ({error.reason}); convert it first, "
                f"as with: iconv -f LATIN1 -t UTF-8 {self._file.name}"
            ) from error
        self._n_bytes += len(block)
        return not is_empty(text)

    def finish(self) -> None:
        """Check that the last character is complete."""
        self.add(b"", final=True)


class _PartCutter:
    """Cut a file after the first separator that is at least `PART_BYTES` after the last cut."""

    def __init__(self, form: Format) -> None:
        self.n_bytes = 0
        self._separator = SEPARATOR_BYTES if form.kind == "text" else b"\n"
        self._cuts = form.can_be_cut
        self._counts_lines = form.kind == "JSON lines"
        self._starts = [(0, 1)]  # byte of each part, and number of the line that starts there
        self._n_lines = 0
        self._tail = b""  # the end of a block may hold the start of a separator

    def add(self, block: bytes) -> None:
        """Process the next bytes."""
        if self._cuts:
            window = self._tail + block
            self._cut(window, self.n_bytes - len(self._tail))
            self._tail = window[max(0, len(window) - len(self._separator) + 1) :]
        self.n_bytes += len(block)

    def _cut(self, window: bytes, offset: int) -> None:
        """Find cuts in a window that starts at the byte `offset`."""
        counted = 0  # lines of the window are counted up to here
        width = len(self._separator)
        while True:
            # A part ends with a separator and has at least PART_BYTES.
            least = self._starts[-1][0] + max(PART_BYTES, width) - width
            found = window.find(self._separator, max(0, least - offset))
            if found < 0:
                break
            cut = found + width
            if self._counts_lines:
                self._n_lines += window.count(b"\n", counted, cut)
                counted = cut
            self._starts.append((offset + cut, self._n_lines + 1))
        if self._counts_lines:
            self._n_lines += window.count(b"\n", counted)

    def byte_ranges(self) -> Iterator[ByteRange]:
        """Yield the ranges of the parts in order."""
        ends = [byte for byte, _ in self._starts[1:]]
        if not ends or ends[-1] < self.n_bytes:
            ends.append(self.n_bytes)
        for (start, line), end in zip(self._starts, ends, strict=False):
            yield ByteRange(start, end, line)
