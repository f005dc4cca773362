"""A corpus in files of one's own: UTF-8 text, by path or glob."""

import codecs
import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path

from tjx_data.documents import Documents, is_empty

SEPARATOR = "<|endoftext|>"
BLOCK_BYTES = 1 << 20


def load_files(path_or_glob: str | Path) -> Documents:
    """Read text files as documents.

    A file is a document, unless it holds ``<|endoftext|>``: then that separates its documents,
    and newlines beside a separator belong to it. Line ends stay as they are.

    Parameters
    ----------
    path_or_glob : str or Path
        A file, or a pattern such as ``"books/**/*.txt"``; files are read in the order of their
        paths.

    Raises
    ------
    ValueError
        With one line for each problem: nothing matches, or a file is empty, unreadable or not
        UTF-8 (with the byte that is not).
    """
    files = find_files(path_or_glob)
    scans = [_scan(file) for file in files]
    if problems := [problem for _, problem in scans if problem]:
        raise ValueError("\n".join(problems))
    # The content decides, not where it lies: a moved corpus is the same corpus.
    together = hashlib.sha256("\n".join(digest for digest, _ in scans).encode()).hexdigest()

    def read() -> Iterator[str]:
        for file in files:
            yield from _read_documents(file)

    return Documents({"path": str(path_or_glob), "files_sha256": together}, read)


def find_files(path_or_glob: str | Path) -> list[Path]:
    """List the files that a path or a pattern names, sorted.

    Raises
    ------
    ValueError
        If there are none.
    """
    pattern = str(Path(path_or_glob).expanduser())
    place = Path(pattern)
    if place.is_file():  # first, so that a name with brackets in it can be given as it is
        return [place]
    if place.is_dir():
        raise ValueError(f"path={pattern!r} is a folder; give a pattern, such as '{pattern}/*.txt'")
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207  absolute patterns
    files = [file for file in found if file.is_file()]
    if not files:
        is_pattern = glob.has_magic(pattern)
        what = "this pattern matches no file" if is_pattern else "there is no such file"
        raise ValueError(f"path={pattern!r}: {what} (looked in {Path.cwd()})")
    return files


def find_file_problems(path_or_glob: str | Path) -> list[str]:
    """Return a line for each thing that makes files no corpus, or an empty list."""
    try:
        load_files(path_or_glob)
    except ValueError as error:
        return str(error).splitlines()
    return []


def _scan(file: Path) -> tuple[str, str | None]:
    """Return the SHA-256 of a file, and what makes it unusable, in bounded memory."""
    hasher = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_bytes, n_pending, has_text = 0, 0, False
    try:
        with file.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                hasher.update(block)
                n_pending = len(decoder.getstate()[0])
                text = decoder.decode(block)
                has_text = has_text or not is_empty(text)
                n_bytes += len(block)
        n_pending = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        byte = n_bytes - n_pending + error.start
        return "", (
            f"{file}: not UTF-8 text at byte {byte} ({error.reason}); give UTF-8 text, or convert "
            f"it first, as with: iconv -f LATIN1 -t UTF-8 {file.name}"
        )
    except OSError as error:
        return "", f"{file}: cannot be read: {error.strerror}"
    if not has_text:
        what = "is empty" if n_bytes == 0 else "holds nothing but white space"
        return "", f"{file}: {what}; a corpus needs text"
    return hasher.hexdigest(), None


def _read_documents(file: Path) -> Iterator[str]:
    parts: list[str] = []  # of the document being read
    carry = ""  # the end of a block may hold the beginning of a separator
    after_separator = False
    with file.open(encoding="utf-8", newline="") as stream:
        while block := stream.read(BLOCK_BYTES):
            *whole, rest = (carry + block).split(SEPARATOR)
            for piece in whole:
                text = "".join([*parts, piece])
                yield (text.lstrip("\n") if after_separator else text).rstrip("\n")
                parts, after_separator = [], True
            n_safe = max(0, len(rest) - len(SEPARATOR) + 1)
            parts.append(rest[:n_safe])
            carry = rest[n_safe:]
    text = "".join([*parts, carry])
    if after_separator:
        text = text.lstrip("\n")
    if text or not after_separator:
        yield text
