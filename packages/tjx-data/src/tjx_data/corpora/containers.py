"""Documents in Arrow files and in tar archives (WebDataset), read without extracting to disk."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tjx_data.bounded_io import check_unpacked, parse_json
from tjx_data.corpora.decompression import read_blocks
from tjx_data.corpora.documents import Malformed
from tjx_data.corpora.formats import Format
from tjx_data.corpora.text_template import record_fields, record_text, type_name

MAX_MEMBER_BYTES = 64 << 20
"""Largest member of an archive that is read; it is held in memory."""
_END_BYTES = 1024  # zeros at the end of an archive


def read_tar(file: Path, form: Format, text_field: str) -> Iterator[str | Malformed]:
    """Yield the documents of an archive: its ``.txt`` members, and the records in ``.json`` ones.

    Other members, such as images, are skipped. The line of a malformed member is its number.

    Parameters
    ----------
    file : Path
        The archive.
    form : Format
        Its compression.
    text_field : str
        Text of a record, as of `record_fields`.

    Raises
    ------
    ValueError
        If the archive is damaged, truncated or a decompression bomb.
    """
    stream = _BlockReader(read_blocks(file, form.compression))
    try:
        with tarfile.open(fileobj=io.BufferedReader(stream, 1 << 16), mode="r|") as archive:
            for number, member in enumerate(archive, 1):
                archive.members = []  # type: ignore[attr-defined]  # it would keep all headers
                suffix = PurePosixPath(member.name).suffix.lower()
                if not member.isreg() or suffix not in (".txt", ".json"):
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    reason = f"has {member.size} bytes; at most {MAX_MEMBER_BYTES} are read"
                    yield Malformed(str(file), number, f"{member.name!r} {reason}")
                    continue
                opened = archive.extractfile(member)
                assert opened is not None
                content = opened.read()
                if len(content) != member.size:
                    raise ValueError(f"{file}: truncated; download or pack it again")
                yield _member_text(content, suffix, text_field, file, number, member.name)
    except tarfile.TarError as error:
        raise ValueError(f"{file}: not a tar archive, or damaged: {error}") from error
    # The library takes a file that ends between two members, or in a header, for complete.
    if stream.finish().strip(b"\0") or len(stream.tail) < _END_BYTES:
        raise ValueError(f"{file}: truncated or damaged (no end mark); download or pack it again")


def _member_text(
    content: bytes, suffix: str, text_field: str, file: Path, number: int, name: str
) -> str | Malformed:
    try:
        if suffix == ".txt":
            return content.decode()
        record = parse_json(content)
        if not isinstance(record, dict):
            raise ValueError(f"holds {type_name(record)}, not an object")
        return record_text(record, text_field)
    except UnicodeDecodeError as error:
        return Malformed(str(file), number, f"{name!r} is not UTF-8 at byte {error.start}")
    except ValueError as error:
        return Malformed(str(file), number, f"{name!r} {error}")


class _BlockReader(io.RawIOBase):
    """Readable stream over blocks of bytes that caches the last ones."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, memoryview(b"")
        self.tail = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; return the number of bytes."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self.tail = (self.tail + block[-_END_BYTES:])[-_END_BYTES:]
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def finish(self) -> bytes:
        """Read to the end and return the last bytes."""
        while self.read(1 << 20):
            pass
        return self.tail


def read_arrow(file: Path, text_field: str) -> Iterator[str | Malformed]:
    """Yield the text of each row of an Arrow file, of the file format or the stream format.

    Parameters
    ----------
    file : Path
        The file, as of `datasets.Dataset.save_to_disk`.
    text_field : str
        Text of a row, as of `record_fields`.

    Raises
    ------
    ValueError
        If the file is damaged, lacks a column, or the ``parquet`` extra is not installed.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ValueError(f"{file}: reading Arrow needs: pip install 'tjx-data[parquet]'") from error
    columns, row, unpacked, size = list(record_fields(text_field)), 0, 0, file.stat().st_size
    try:
        # Not mapped: access to a truncated file would kill the process.
        with pa.OSFile(str(file)) as source:  # type: ignore[attr-defined]
            for batch in _arrow_batches(source):
                if missing := [name for name in columns if name not in batch.schema.names]:
                    raise ValueError(
                        f"{file}: has no column {missing[0]!r}; text_field must be one of "
                        f"{', '.join(batch.schema.names)}"
                    )
                unpacked += batch.nbytes
                check_unpacked(file, unpacked, size)
                for record in batch.select(columns).to_pylist():
                    row += 1
                    try:
                        yield record_text(record, text_field)
                    except ValueError as error:
                        yield Malformed(str(file), row, str(error))
    except (OSError, pa.lib.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not Arrow, or damaged: {error}") from error


def _arrow_batches(source: Any) -> Iterator[Any]:
    import pyarrow.ipc as ipc

    if source.read(6) == b"ARROW1":
        reader = ipc.open_file(source)  # type: ignore[no-untyped-call]
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
        return
    source.seek(0)
    yield from ipc.open_stream(source)  # type: ignore[no-untyped-call]
