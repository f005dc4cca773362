"""Corpora from files: text, JSON lines, Parquet, Arrow and tar, by path or pattern."""

import glob
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tjx_core import ConfigError, Problem, problems_of
from tjx_data.corpora.containers import read_arrow, read_tar
from tjx_data.corpora.decompression import read_blocks
from tjx_data.corpora.documents import Documents, Malformed, Part
from tjx_data.corpora.file_scan import ByteRange, FileStamp, NoTextError, check_unchanged, scan
from tjx_data.corpora.formats import (
    BEGINS_ARRAY,
    Format,
    format_of,
    is_corpus_file,
    split_at_separators,
    split_lines,
    texts_of_records,
)
from tjx_data.corpora.hub import HubError
from tjx_data.corpora.parquet import parquet_parts
from tjx_data.corpora.remote import download, is_url

_log = logging.getLogger(__name__)

CHECKED_RECORDS = 100
"""Records at the start of a file, of which at least one must hold text."""

_UNITS = {"JSON lines": "line", "Arrow": "row", "tar": "member"}

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class FilePart:
    """A byte range of a text or JSON lines file, or all of a file that cannot be cut.

    Attributes
    ----------
    file : Path
        The file.
    form : Format
        Its format.
    stamp : FileStamp
        Its stamp when it was scanned.
    sha256 : str
        Hash of its unpacked bytes.
    text_field : str
        Field of the text in a record.
    byte_range : ByteRange
        Bytes of this part.
    """

    file: Path
    form: Format
    stamp: FileStamp
    sha256: str
    text_field: str
    byte_range: ByteRange

    @property
    def identity(self) -> str:
        """A string that differs for parts with other documents."""
        return (
            f"{_identity(self.form, self.sha256, self.text_field)} "
            f"{self.byte_range.start}-{self.byte_range.end}"
        )

    def read(self) -> Iterator[str | Malformed]:
        """Yield the documents.

        Raises
        ------
        ValueError
            If the file is damaged, or changed since it was scanned.
        """
        check_unchanged(self.file, self.stamp)
        if self.form.kind == "tar":
            return read_tar(self.file, self.form, self.text_field)
        if self.form.kind == "Arrow":
            return read_arrow(self.file, self.text_field)
        start, end, line = self.byte_range
        if self.form.can_be_cut:
            blocks = read_blocks(self.file, self.form.compression, start, end)
        else:
            blocks = read_blocks(self.file, self.form.compression)
        if self.form.kind == "text":
            return split_at_separators(blocks, after_separator=start > 0)
        return texts_of_records(split_lines(blocks), self.text_field, str(self.file), line)


def load_files(path: Paths, *, text_field: str = "text") -> Documents:
    """Open local files as documents.

    The file name determines the format. ``.jsonl``, ``.ndjson`` and ``.json`` are JSON lines: one
    object per line with the text in a field. ``.parquet`` and ``.arrow`` have the text in a column.
    ``.tar`` archives (WebDataset) have documents in ``.txt`` members and records in ``.json``
    members; they are never extracted. All other files are UTF-8 text: one document, or several
    separated by ``<|endoftext|>``, whose adjacent newlines belong to the separator. Line endings
    are kept. All but Parquet and Arrow may be compressed, with ``.gz`` or ``.zst`` appended to the
    name.

    Records without text are returned as `Malformed`. Of several files, those of white space only
    are left out with a warning.

    Parameters
    ----------
    path : str, Path or sequence of them
        A file, a pattern such as ``"books/**/*.txt"``, a folder (all its files of these formats
        and ``.md``, also in folders below), or several, also separated by commas. Files of a
        pattern are sorted by path; a file that several patterns match is read once. URLs that
        fsspec knows (``s3://bucket/*.jsonl``) are downloaded into `default_cache_dir`.
    text_field : str
        Field or column of the text, or a template of several: ``"{title}: {text}"``.

    Returns
    -------
    Documents
        The documents, in the order of the sorted files.

    Raises
    ------
    ValueError
        With one line for each problem: no file matches; no file holds text; a file is unreadable,
        truncated, damaged or not of its format; text is not UTF-8; no record has the field; or an
        extra is not installed.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.txt").write_text("one<|endoftext|>two")
    ...     list(load_files(f"{folder}/*.txt"))
    ['one', 'two']
    """
    files = find_files(path)
    opened: list[_OpenedFile] = []
    problems: list[Problem] = []
    empty: list[str] = []
    for file in files:
        try:
            opened.append(_open(file, text_field))
        except NoTextError as error:
            empty.append(str(error))
        except ValueError as error:
            problems += problems_of(error)
    if problems or not opened:
        raise ConfigError([*problems, *empty])
    for line in empty:
        _log.warning("%s; left out", line)
    # The content identifies the corpus: moving the files does not change it.
    together = hashlib.sha256("\n".join(one.identity for one in opened).encode()).hexdigest()
    source = {"path": ",".join(_patterns(path)), "files_sha256": together}
    if any(format_of(file).kind != "text" for file in files):
        source["text_field"] = text_field

    def parts() -> Iterator[Part]:
        for one in opened:
            yield from one.parts()

    return Documents(source, parts, sum(one.n_bytes for one in opened))


def find_file_problems(path: Paths, *, text_field: str = "text") -> list[Problem]:
    """Return the problems that `load_files` raises."""
    try:
        load_files(path, text_field=text_field)
    except ValueError as error:
        return list(problems_of(error))
    return []


def find_files(path: Paths) -> list[Path]:
    """List the files that paths and patterns match, each once.

    Raises
    ------
    ValueError
        With one line for each pattern without a file.
    """
    found: dict[Path, None] = {}
    problems: list[Problem] = []
    for pattern in _patterns(path):
        try:
            found.update(dict.fromkeys(_match(pattern)))
        except HubError:
            raise
        except ValueError as error:
            problems += problems_of(error)
    if problems:
        raise ConfigError(problems)
    return list(found)


@dataclass(frozen=True)
class _OpenedFile:
    identity: str
    n_bytes: int  # of text, approximately
    parts: Callable[[], Iterable[Part]]


def _open(file: Path, text_field: str) -> _OpenedFile:
    file = file.absolute()  # worker processes may have another working directory
    form = format_of(file)
    if form.kind in ("Parquet", "Arrow") and form.compression != "none":
        raise ValueError(f"{file}: {form.kind} must not be compressed as a whole; unpack the file")
    found, stamp = scan(file, form)
    identity = _identity(form, found.sha256, text_field)
    if form.kind == "Parquet":
        groups, n_bytes = parquet_parts(file, found, stamp, text_field)
        return _OpenedFile(identity, n_bytes, lambda: groups)

    def parts() -> Iterator[FilePart]:
        for byte_range in found.byte_ranges:
            yield FilePart(file, form, stamp, found.sha256, text_field, byte_range)

    if form.kind != "text":
        _check_records(next(parts()))
    return _OpenedFile(identity, found.n_bytes, parts)


def _check_records(part: FilePart) -> None:
    """Check that the first records of a file include text in the field."""
    records = list(islice(part.read(), CHECKED_RECORDS))
    if part.form.kind in ("Arrow", "tar") and not records:
        raise ValueError(
            f"{part.file}: holds no text; expected rows, or members with names in .txt or .json"
        )
    first = next(iter(records), "")
    if isinstance(first, str):
        return
    # The last element of an array over many lines has no comma and may look like a record.
    if first.reason == BEGINS_ARRAY or all(isinstance(record, Malformed) for record in records):
        raise ValueError(
            f"{part.file}: holds no {part.form.kind} with text: line {first.line} {first.reason}; "
            f"expected one object per {_UNITS[part.form.kind]} with text in the field "
            f"text_field={part.text_field!r}"
        )


def _patterns(path: Paths) -> list[str]:
    if not isinstance(path, str | Path):
        return [pattern for one in path for pattern in _patterns(one)]
    whole = str(Path(path).expanduser())
    if Path(whole).is_file():  # a file name may contain commas
        return [whole]
    patterns = [pattern.strip() for pattern in str(path).split(",")]
    return [
        pattern if is_url(pattern) else str(Path(pattern).expanduser())
        for pattern in patterns
        if pattern
    ]


def _match(pattern: str) -> list[Path]:
    if is_url(pattern):
        return download(pattern)
    literal = Path(pattern)
    if literal.is_file():  # a file name may contain brackets
        return [literal]
    if literal.is_dir():
        found = sorted(file for file in literal.rglob("*") if is_corpus_file(file))
        files = [file for file in found if file.is_file() and not _is_hidden(file, literal)]
        if files:
            return files
        message = (
            f"got {pattern!r}, a folder without text; expected files in .txt, .md, .jsonl, "
            ".parquet, .arrow or .tar in it; give a pattern for other names, such as "
            f"'{pattern}/*'"
        )
        raise ConfigError([Problem("path", message)])
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207  absolute patterns
    files = [file for file in found if file.is_file()]
    if not files:
        is_pattern = glob.has_magic(pattern)
        reason = "this pattern matches no file" if is_pattern else "no such file"
        message = f"got {pattern!r}; {reason} (working directory: {Path.cwd()})"
        raise ConfigError([Problem("path", message)])
    return files


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(name.startswith(".") for name in file.relative_to(folder).parts)


def _identity(form: Format, sha256: str, text_field: str) -> str:
    """Return a string that determines the documents of a file."""
    return sha256 if form.kind == "text" else f"{form.kind} {text_field} {sha256}"
