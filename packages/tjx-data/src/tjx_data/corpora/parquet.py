"""Documents in a column of a Parquet file, with row groups as parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tjx_data.bounded_io import check_unpacked
from tjx_data.corpora.documents import Malformed
from tjx_data.corpora.file_scan import PART_BYTES, FileScan, FileStamp, check_unchanged
from tjx_data.corpora.text_template import record_fields, record_text

MAX_BATCH_ROWS = 256
BATCH_BYTES = 16 << 20


@dataclass(frozen=True)
class ParquetPart:
    """Consecutive row groups of a Parquet file.

    Attributes
    ----------
    file : Path
        The file.
    stamp : FileStamp
        Its stamp when it was scanned.
    sha256 : str
        Hash of its bytes.
    text_field : str
        Column of the text.
    first_group, end_group : int
        First row group, and the one after the last.
    first_row : int
        Number of the first row in the file, from 1.
    """

    file: Path
    stamp: FileStamp
    sha256: str
    text_field: str
    first_group: int
    end_group: int
    first_row: int

    @property
    def identity(self) -> str:
        """A string that differs for parts with other documents."""
        return f"{self.sha256} {self.text_field} {self.first_group}-{self.end_group}"

    def read(self) -> Iterator[str | Malformed]:
        """Yield the texts; a row without text is malformed.

        Raises
        ------
        ValueError
            If the file is damaged, changed since the scan, or a decompression bomb.
        """
        check_unchanged(self.file, self.stamp)
        groups = list(range(self.first_group, self.end_group))
        row, unpacked = self.first_row, 0
        # A dictionary column holds a repeated text once, which bounds the memory.
        columns = list(record_fields(self.text_field))
        with _opened(self.file, read_dictionary=columns) as opened:
            batches = opened.iter_batches(
                _batch_rows(opened, groups, self.text_field),
                row_groups=groups,
                columns=columns,
                use_threads=False,
            )
            for batch in batches:
                by_name = [batch.column(name) for name in columns]
                for values in zip(*by_name, strict=True):
                    text = self._to_text(dict(zip(columns, values, strict=True)), row)
                    unpacked += len(text) if isinstance(text, str) else 0
                    check_unpacked(self.file, unpacked, self.stamp.size)
                    yield text
                    row += 1

    def _to_text(self, values: dict[str, Any], row: int) -> str | Malformed:
        name = self.text_field
        try:
            record = {}
            for name, value in values.items():
                record[name] = value.as_py()
            return record_text(record, self.text_field)
        except UnicodeDecodeError:
            return Malformed(str(self.file), row, f"{name!r} is not UTF-8")
        except ValueError as error:
            return Malformed(str(self.file), row, str(error))


def parquet_parts(
    file: Path, scan: FileScan, stamp: FileStamp, text_field: str
) -> tuple[list[ParquetPart], int]:
    """Divide a Parquet file into parts of about `PART_BYTES`.

    Parameters
    ----------
    file : Path
        The file.
    scan, stamp : FileScan, FileStamp
        Its scan.
    text_field : str
        Column of the text.

    Returns
    -------
    tuple
        The parts, and the approximate number of bytes of text.

    Raises
    ------
    ValueError
        If it is not Parquet, has no rows or no such column of strings, claims the unpacked size of
        a decompression bomb, or the ``parquet`` extra is not installed.
    """
    with _opened(file) as opened:
        columns = _find_columns(file, opened, text_field)
        meta = opened.metadata
        parts: list[ParquetPart] = []
        first_group, first_row, row, size, n_bytes = 0, 1, 1, 0, 0
        for group in range(meta.num_row_groups):
            group_meta = meta.row_group(group)
            row += group_meta.num_rows
            sizes = [group_meta.column(column).total_uncompressed_size for column in columns]
            claimed = sum(sizes)
            if group_meta.num_rows < 0 or min(sizes) < 0:
                raise ValueError(f"{file}: damaged: row group {group} has a negative size")
            size += claimed
            check_unpacked(file, n_bytes + size, stamp.size)
            if size >= PART_BYTES or group == meta.num_row_groups - 1:
                parts.append(
                    ParquetPart(
                        file, stamp, scan.sha256, text_field, first_group, group + 1, first_row
                    )
                )
                n_bytes += size
                first_group, first_row, size = group + 1, row, 0
    if row == 1:
        raise ValueError(f"{file}: has no rows; expected text")
    return parts, n_bytes


def _batch_rows(opened: Any, groups: list[int], text_field: str) -> int:
    """Return the number of rows per batch: fewer for long texts."""
    columns = [_column_index(opened, name) for name in record_fields(text_field)]
    metas = [opened.metadata.row_group(group) for group in groups]
    rows: int = sum(meta.num_rows for meta in metas)
    size: int = sum(
        meta.column(column).total_uncompressed_size for meta in metas for column in columns
    )
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * rows // max(1, size)))


def _find_columns(file: Path, opened: Any, text_field: str) -> list[int]:
    """Return the indices of the columns of the text, which have strings (or numbers)."""
    import pyarrow.types as types

    names, fields = opened.schema_arrow.names, record_fields(text_field)
    for name in fields:
        if name not in names:
            raise ValueError(
                f"{file}: has no column {name!r}; text_field must be one of {', '.join(names)}"
            )
        kind = opened.schema_arrow.field(name).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        is_number = types.is_integer(kind) or types.is_floating(kind)
        if is_number and fields != (text_field,):
            continue
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
            raise ValueError(f"{file}: column {name!r} holds {kind}, not strings")
    return [_column_index(opened, name) for name in fields]


def _column_index(opened: Any, text_field: str) -> int:
    """Return the index of a column among the leaf columns of the file."""
    leaves: list[str] = [opened.schema.column(i).path for i in range(len(opened.schema))]
    return leaves.index(text_field)


@contextmanager
def _opened(file: Path, *, read_dictionary: list[str] | None = None) -> Iterator[Any]:
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{file}: reading Parquet needs: pip install 'tjx-data[parquet]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(  # type: ignore[no-untyped-call]
            file, read_dictionary=read_dictionary
        ) as opened:
            yield opened
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise ValueError(f"{file}: not Parquet, or damaged: {error}") from error
