"""One look at each file: whether it is text, its hash, and where it can be cut.

What was found is kept in the user's cache folder, so that a large corpus is looked at once.
"""

import codecs
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from tjx_data.atomic import write_atomically
from tjx_data.cache import default_cache_dir
from tjx_data.corpora.decompression import read_blocks
from tjx_data.corpora.documents import is_empty
from tjx_data.corpora.formats import SEPARATOR_BYTES, Format

PART_BYTES = 1 << 21  # about as many in a part
KEPT_FROM_BYTES = 1 << 20  # smaller files are looked at again sooner than looked up
SETTLED_NS = 2 * 10**9  # a file changed later than that before the look may change unseen
VERSION = 1  # of what is kept

_log = logging.getLogger(__name__)


class FileStamp(NamedTuple):
    """What changes when a file changes."""

    size: int
    mtime_ns: int
    inode: int


class ByteRange(NamedTuple):
    """Bytes of a file that hold whole documents.

    Attributes
    ----------
    start, end : int
        The first byte, and the one after the last.
    first_line : int
        The number of its first line in the file; 1 is the first. Of JSON lines alone.
    """

    start: int
    end: int
    first_line: int


@dataclass(frozen=True)
class FileScan:
    """What one look at a file found.

    Attributes
    ----------
    sha256 : str
        Of its bytes, unpacked.
    n_bytes : int
        How many those are.
    stretches : tuple[Stretch, ...]
        What the file is cut into, in order; of a packed file and of Parquet one.
    """

    sha256: str
    n_bytes: int
    stretches: tuple[ByteRange, ...]


class NoTextError(ValueError):
    """A file is sound and holds no text."""


def stamp_of(file: Path) -> FileStamp:
    """Return the stamp of a file.

    Raises
    ------
    ValueError
        If it cannot be looked at.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    return FileStamp(status.st_size, status.st_mtime_ns, status.st_ino)


def check_unchanged(file: Path, stamp: FileStamp) -> None:
    """Check that a file is what it was when it was looked at.

    Raises
    ------
    ValueError
        If it is not.
    """
    now = stamp_of(file)  # another machine may give the file another inode
    if (now.size, now.mtime_ns) != (stamp.size, stamp.mtime_ns):
        raise ValueError(f"{file}: was changed since the start; start again, to read one version")


def scan(file: Path, form: Format) -> tuple[FileScan, FileStamp]:
    """Look at a file, or at what is kept of an earlier look, in bounded memory.

    Raises
    ------
    ValueError
        If it is unreadable, damaged, changed meanwhile, or text that is not UTF-8.
    NoTextError
        If it is empty, or holds nothing but white space.
    """
    before = stamp_of(file)
    kept = _place(file, form)
    if found := _look_up(kept, before):
        return found, before
    found = _look_at(file, form)
    if stamp_of(file) != before:
        raise ValueError(f"{file}: was changed while it was read; wait until it is complete")
    settled = time.time_ns() - before.mtime_ns > SETTLED_NS
    if settled and before.size >= KEPT_FROM_BYTES:
        _keep(kept, found, before)
    return found, before


def _place(file: Path, form: Format) -> Path:
    key = "\n".join([str(file.absolute()), *form, str(PART_BYTES), str(VERSION)])
    name = hashlib.sha256(os.fsencode(key)).hexdigest()
    return default_cache_dir() / "scans" / f"{name[:32]}.json"


def _look_up(kept: Path, stamp: FileStamp) -> FileScan | None:
    """Return what is kept of a file, if that is whole and the file still is what it was."""
    try:
        content = json.loads(kept.read_bytes())
        digest = content.pop("digest")
        if content["stamp"] != list(stamp) or digest != _digest(content):
            return None
        found = content["scan"]
        stretches = tuple(ByteRange(*stretch) for stretch in found["stretches"])
        return FileScan(found["sha256"], found["n_bytes"], stretches)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # not there, or damaged: the file itself says it all


def _keep(kept: Path, found: FileScan, stamp: FileStamp) -> None:
    content = {"scan": asdict(found), "stamp": list(stamp)}
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps({**content, "digest": _digest(content)}).encode())
    except OSError as error:
        _log.warning("%s: what was found in a file is not kept: %s", kept, error.strerror)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _look_at(file: Path, form: Format) -> FileScan:
    hasher = hashlib.sha256()
    check = _TextCheck(file) if form.kind == "text" else None
    cutter = _Cutter(form)
    has_text = False
    for block in read_blocks(file, form.compression):
        hasher.update(block)
        if check is not None:
            has_text |= check.add(block)
        else:
            has_text = has_text or not block.isspace()
        cutter.add(block)
    if check is not None:
        check.end()
    if not has_text:
        what = "holds nothing but white space" if cutter.n_bytes else "is empty"
        raise NoTextError(f"{file}: {what}; a corpus needs text")
    return FileScan(hasher.hexdigest(), cutter.n_bytes, tuple(cutter.stretches()))


class _TextCheck:
    """Checks that the blocks of a file are UTF-8."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._n_bytes = 0

    def add(self, block: bytes, *, final: bool = False) -> bool:
        """Tell whether a block holds more than white space."""
        n_pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(block, final=final)
        except UnicodeDecodeError as error:
            byte = self._n_bytes - n_pending + error.start
            raise ValueError(
                f"{self._file}: not UTF-8 text at byte {byte} ({error.reason}); give UTF-8 text, "
                f"or convert it first, as with: iconv -f LATIN1 -t UTF-8 {self._file.name}"
            ) from error
        self._n_bytes += len(block)
        return not is_empty(text)

    def end(self) -> None:
        """Check that the last character is whole."""
        self.add(b"", final=True)


class _Cutter:
    """Finds where a file can be cut: after the first separator, `PART_BYTES` after the last cut."""

    def __init__(self, form: Format) -> None:
        self.n_bytes = 0
        self._mark = {"text": SEPARATOR_BYTES, "JSON lines": b"\n", "Parquet": b""}[form.kind]
        self._cuts = form.can_be_cut and self._mark != b""
        self._counts_lines = form.kind == "JSON lines"
        self._borders = [(0, 1)]  # byte, and number of the line that begins there
        self._n_lines = 0
        self._tail = b""  # the end of a block may hold the beginning of a separator

    def add(self, block: bytes) -> None:
        """Go through the next bytes."""
        if self._cuts:
            window = self._tail + block
            self._cut(window, self.n_bytes - len(self._tail))
            self._tail = window[max(0, len(window) - len(self._mark) + 1) :]
        self.n_bytes += len(block)

    def _cut(self, window: bytes, offset: int) -> None:
        """Go through a window that begins at the byte `offset`."""
        counted = 0  # lines are counted up to here; their windows do not overlap
        while True:
            # The mark must end where the stretch has the length or more.
            least = self._borders[-1][0] + max(PART_BYTES, len(self._mark)) - len(self._mark)
            at = window.find(self._mark, max(0, least - offset))
            if at < 0:
                break
            cut = at + len(self._mark)
            if self._counts_lines:
                self._n_lines += window.count(b"\n", counted, cut)
                counted = cut
            self._borders.append((offset + cut, self._n_lines + 1))
        if self._counts_lines:
            self._n_lines += window.count(b"\n", counted)

    def stretches(self) -> Iterator[ByteRange]:
        """Yield what the file is cut into."""
        ends = [byte for byte, _ in self._borders[1:]]
        if not ends or ends[-1] < self.n_bytes:
            ends.append(self.n_bytes)
        for (start, line), end in zip(self._borders, ends, strict=False):
            yield ByteRange(start, end, line)
