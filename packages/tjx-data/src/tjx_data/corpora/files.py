"""A corpus in files of one's own, by path or pattern: text, JSON lines, Parquet, packed or not."""

import glob
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tjx_data.corpora.decompression import read_blocks
from tjx_data.corpora.documents import Documents, Malformed, Part
from tjx_data.corpora.file_scan import ByteRange, FileStamp, NoTextError, check_unchanged, scan
from tjx_data.corpora.formats import (
    BEGINS_ARRAY,
    Format,
    format_of,
    split_at_separators,
    split_lines,
    texts_of_records,
)
from tjx_data.corpora.parquet import parquet_parts

_log = logging.getLogger(__name__)

TRIED_RECORDS = 100  # a file whose first ones are all malformed is another kind of file

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class FilePart:
    """A stretch of a file of text or JSON lines; of a packed file all of it.

    Attributes
    ----------
    file : Path
        The file.
    form : Format
        What it holds.
    stamp : Stamp
        What it was when it was looked at.
    sha256 : str
        Of all its bytes, unpacked.
    text_field : str
        Where the text is in a record.
    stretch : Stretch
        The bytes that this part reads.
    """

    file: Path
    form: Format
    stamp: FileStamp
    sha256: str
    text_field: str
    stretch: ByteRange

    @property
    def identity(self) -> str:
        """Another string for other documents."""
        return (
            f"{_identity(self.form, self.sha256, self.text_field)} "
            f"{self.stretch.start}-{self.stretch.end}"
        )

    def read(self) -> Iterator[str | Malformed]:
        """Yield the documents.

        Raises
        ------
        ValueError
            If the file is damaged, or another than it was.
        """
        check_unchanged(self.file, self.stamp)
        start, end, line = self.stretch
        if self.form.can_be_cut:
            blocks = read_blocks(self.file, self.form.compression, start, end)
        else:
            blocks = read_blocks(self.file, self.form.compression)
        if self.form.kind == "text":
            return split_at_separators(blocks, after_separator=start > 0)
        return texts_of_records(split_lines(blocks), self.text_field, str(self.file), line)


def load_files(path: Paths, *, text_field: str = "text") -> Documents:
    """Read files as documents.

    The end of a name tells what a file holds. ``.jsonl``, ``.ndjson`` and ``.json`` are JSON
    lines: one object a line, its text in a field. ``.parquet`` has the text in a column. Anything
    else is UTF-8 text: a file is a document, unless it holds ``<|endoftext|>``: then that
    separates its documents, and newlines beside a separator belong to it. Line ends stay as they
    are. All but Parquet may be packed, with ``.gz`` or ``.zst`` after the rest of the name.

    A record that holds no text is found as `Malformed` among the documents of its part. Of several
    files, those that hold nothing but white space are left out, with a warning that names them.

    Parameters
    ----------
    path : str, Path or sequence of them
        A file, a pattern such as ``"books/**/*.txt"``, or several of them, also with commas
        between. The files of a pattern come in the order of their paths, and a file that several
        patterns name comes once.
    text_field : str
        Where the text is in a record.

    Raises
    ------
    ValueError
        With one line for each problem: nothing matches; no file holds text; a file is unreadable,
        cut short, damaged or not what its name says; text is not UTF-8 (with the byte that is not);
        a field that no record has (with those there are); or an extra that is not installed.
    """
    files = find_files(path)
    opened: list[_Opened] = []
    problems: list[str] = []
    empty: list[str] = []
    for file in files:
        try:
            opened.append(_open(file, text_field))
        except NoTextError as error:
            empty.append(str(error))
        except ValueError as error:
            problems += str(error).splitlines()
    if problems or not opened:
        raise ValueError("\n".join([*problems, *empty]))
    for line in empty:
        _log.warning("%s; left out", line)
    # The content decides, not where it lies: a moved corpus is the same corpus.
    together = hashlib.sha256("\n".join(one.identity for one in opened).encode()).hexdigest()
    source = {"path": ",".join(_patterns(path)), "files_sha256": together}
    if any(format_of(file).kind != "text" for file in files):
        source["text_field"] = text_field

    def parts() -> Iterator[Part]:
        for one in opened:
            yield from one.parts()

    return Documents(source, parts, sum(one.n_bytes for one in opened))


def find_file_problems(path: Paths, *, text_field: str = "text") -> list[str]:
    """Return a line for each thing that makes files no corpus, or an empty list."""
    try:
        load_files(path, text_field=text_field)
    except ValueError as error:
        return str(error).splitlines()
    return []


def find_files(path: Paths) -> list[Path]:
    """List the files that a path, a pattern or several of them name, each once.

    Raises
    ------
    ValueError
        With a line for each that names none.
    """
    found: dict[Path, None] = {}
    problems = []
    for pattern in _patterns(path):
        try:
            found.update(dict.fromkeys(_match(pattern)))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return list(found)


@dataclass(frozen=True)
class _Opened:
    identity: str
    n_bytes: int  # of text, about
    parts: Callable[[], Iterable[Part]]


def _open(file: Path, text_field: str) -> _Opened:
    file = file.absolute()  # other processes may work in another folder
    form = format_of(file)
    if form.kind == "Parquet" and form.compression != "none":
        raise ValueError(f"{file}: Parquet is packed inside and read as it is; unpack the file")
    found, stamp = scan(file, form)
    identity = _identity(form, found.sha256, text_field)
    if form.kind == "Parquet":
        groups, n_bytes = parquet_parts(file, found, stamp, text_field)
        return _Opened(identity, n_bytes, lambda: groups)

    def parts() -> Iterator[FilePart]:
        for stretch in found.stretches:
            yield FilePart(file, form, stamp, found.sha256, text_field, stretch)

    if form.kind == "JSON lines":
        _try_records(next(parts()))
    return _Opened(identity, found.n_bytes, parts)


def _try_records(part: FilePart) -> None:
    """Refuse a file that holds no records, or has the text in another field."""
    records = list(islice(part.read(), TRIED_RECORDS))
    first = next(iter(records), "")
    if isinstance(first, str):
        return
    # Of an array over many lines the last element, without a comma, may look like a record.
    if first.reason == BEGINS_ARRAY or all(isinstance(record, Malformed) for record in records):
        raise ValueError(
            f"{part.file}: holds no JSON lines with text: line {first.line} {first.reason}. JSON "
            "lines are one object a line, with the text in the field that "
            f"text_field={part.text_field!r} names"
        )


def _patterns(path: Paths) -> list[str]:
    if not isinstance(path, str | Path):
        return [pattern for one in path for pattern in _patterns(one)]
    whole = str(Path(path).expanduser())
    if Path(whole).is_file():  # first, so that a name with a comma in it can be given as it is
        return [whole]
    pieces = [piece.strip() for piece in str(path).split(",")]
    return [str(Path(piece).expanduser()) for piece in pieces if piece]


def _match(pattern: str) -> list[Path]:
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


def _identity(form: Format, sha256: str, text_field: str) -> str:
    """Name what is read from a file: its bytes, and for records how they are taken."""
    return sha256 if form.kind == "text" else f"{form.kind} {text_field} {sha256}"
