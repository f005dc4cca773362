"""Token ids in ``.npy`` files and ``.bin`` files, such as nanoGPT's train.bin.

Files are read with ``pread``. ``meta.pkl`` of nanoGPT is never read: unpickling runs its code.
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tjx_data.config import TOKEN_SUFFIXES
from tjx_data.corpora.file_scan import (
    FileStamp,
    check_unchanged,
    file_stamp,
    load_cached,
    save_cached,
    scan_cache_file,
)
from tjx_data.loading.shard_layout import ShardLayout
from tjx_data.loading.shard_reader import ShardReader
from tjx_data.loading.token_source import TokenSource
from tjx_data.prepared.index import FileEntry
from tjx_data.prepared.integrity import check_hash

IdDtype = Literal["auto", "uint16", "uint32"]

_FIX = "restore the file"
_BLOCK_BYTES = 1 << 22  # a multiple of every token size
_MAX_NPY_HEADER = 4096  # characters; a header of a vector has about 120
# Files of llm.c start with 256 numbers, int32: magic, version, number of tokens.
_LLMC_HEADER_BYTES = 1024
_LLMC_DTYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}


class FileTokens(TokenSource):
    """Token ids in one file.

    Parameters
    ----------
    file : Path
        A ``.npy`` or ``.bin`` file.
    vocab_size : int
        Ids are below it.
    id_dtype : {"auto", "uint16", "uint32"}
        Dtype of a ``.bin`` file without a header.
    keep : tuple of float
        Start and end of the part of the file to read, as fractions of its tokens.
    max_tokens : int or None
        Most tokens to read of this part.
    use_cache : bool
        Whether the hash of an earlier scan is used while size and time of the file are the same.

    Raises
    ------
    ValueError
        If the file is damaged or of another format.
    """

    def __init__(
        self,
        file: Path,
        *,
        vocab_size: int,
        id_dtype: IdDtype = "auto",
        keep: tuple[float, float] = (0.0, 1.0),
        max_tokens: int | None = None,
        use_cache: bool = True,
    ) -> None:
        file = file.expanduser().absolute()
        self._file, self._stamp, self._use_cache = file, file_stamp(file), use_cache
        self._form = _read_form(file, id_dtype, vocab_size)
        first, end = (int(self._form.n_tokens * fraction) for fraction in keep)
        end = end if max_tokens is None else min(end, first + max_tokens)
        self.name, self.n_tokens, self._first = str(file), end - first, first
        self._layout = ShardLayout(
            files=(FileEntry(name=file.name, n_bytes=self._stamp.size, sha256=""),),
            n_tokens=self.n_tokens,
            shard_tokens=self._form.n_tokens,
            dtype=self._form.dtype,
            header_bytes=self._form.offset + first * self._form.dtype.itemsize,
            vocab_size=vocab_size,
            fix=_FIX,
        )

    @cached_property
    def reader(self) -> ShardReader:  # type: ignore[override]  # a constant, made on first access
        """The reader; opening it hashes the file, unless an earlier hash is cached."""
        check_unchanged(self._file, self._stamp)
        return ShardReader(self._file.parent, self._layout._replace(files=(self._entry,)))

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """SHA-256 of the file, and the part and dtype that are read."""
        return {
            "tokens": f"{self._entry.sha256} {self._form.dtype.str} "
            f"{self._first}-{self._first + self.n_tokens}",
            "vocab_size": str(self._layout.vocab_size),
        }

    def verify(self) -> None:
        """Compare the SHA-256 of the file with that of its scan."""
        check_hash(self._file.parent, self._entry, fix=_FIX)

    @cached_property
    def _entry(self) -> FileEntry:
        """Name, size and hash of the file, whose ids are checked."""
        found = _scan(self._file, self._stamp, self._form, use_cache=self._use_cache)
        if (largest := found["largest"]) >= self._layout.vocab_size:
            other = "uint32" if self._form.dtype.itemsize == 2 else "uint16"
            hint = f", or --data.id_dtype {other} if that is its dtype"
            message = (
                f"{self._file}: got token id {largest} as {self._form.dtype.name}; expected ids "
                f"below the vocabulary of {self._layout.vocab_size}; give the tokenizer that made "
                f"the file, or --model.vocab_size {largest + 1} or more"
            )
            raise ValueError(message + (hint if self._form.is_raw else ""))
        return FileEntry(name=self._file.name, n_bytes=self._stamp.size, sha256=found["sha256"])


class _Form(NamedTuple):
    """Layout of a token file."""

    dtype: np.dtype[Any]
    offset: int
    n_tokens: int
    is_raw: bool  # no header states the dtype


def check_token_file(file: Path, id_dtype: IdDtype = "auto") -> None:
    """Check the size and header of a file, without reading its ids.

    Raises
    ------
    ValueError
        If it is missing, damaged or of another format.
    """
    file = file.expanduser().absolute()
    file_stamp(file)
    if id_dtype == "auto" and _header_form(file) is None:
        return  # the vocabulary, which is not known yet, determines the dtype
    _read_form(file, id_dtype, 1)


def largest_id(file: Path, id_dtype: IdDtype = "auto") -> int:
    """Return the largest token id of a file.

    Parameters
    ----------
    file : Path
        A .bin or .npy file, as for `TokenLoader.from_tokens`.
    id_dtype : {"uint16", "uint32", "auto"}
        Dtype of the ids of a raw file.

    Returns
    -------
    int
        The largest id.

    Raises
    ------
    ValueError
        If the file is damaged or of another format.
    """
    file = file.expanduser().absolute()
    found = _scan(file, file_stamp(file), _read_form(file, id_dtype, 1), use_cache=True)
    return int(found["largest"])


def _read_form(file: Path, id_dtype: IdDtype, vocab_size: int) -> _Form:
    if not file.is_file():
        raise ValueError(f"{file}: not a regular file; expected token ids in a .bin or .npy file")
    if file.suffix.lower() not in TOKEN_SUFFIXES:
        raise ValueError(
            f"{file}: got suffix {file.suffix!r}; expected token ids in a .bin or .npy file; pass "
            "text to tjx_data.prepare"
        )
    size, form = file.stat().st_size, _header_form(file)
    if form is None:
        if id_dtype == "auto":
            dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        else:
            dtype = np.dtype(id_dtype).newbyteorder("<")
        if size % dtype.itemsize:
            raise ValueError(
                f"{file}: got {size} bytes; expected a multiple of {dtype.itemsize} for "
                f"{dtype.name}; it is truncated, or of another dtype (--data.id_dtype)"
            )
        form = _Form(dtype, 0, size // dtype.itemsize, is_raw=True)
        if id_dtype == "auto":
            _check_looks_like(file, form)
    expected = form.offset + form.n_tokens * form.dtype.itemsize
    if size != expected:
        raise ValueError(
            f"{file}: got {size} bytes; expected {expected} by its header; it is truncated or "
            "damaged; write it again"
        )
    if not form.n_tokens:
        raise ValueError(f"{file}: is empty; expected token ids")
    return form


def _header_form(file: Path) -> _Form | None:
    """Return the form that a file's header states, or None for raw tokens."""
    return _npy_form(file) if file.suffix.lower() == ".npy" else _llmc_form(file)


def _npy_form(file: Path) -> _Form:
    try:
        with file.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version}")
            read = np.lib.format.read_array_header_1_0
            if version == (2, 0):
                read = np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream, max_header_size=_MAX_NPY_HEADER)
            offset = stream.tell()
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file}: not a .npy file, or damaged: {error}") from error
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ValueError(
            f"{file}: got an array of {dtype} with shape {shape}; expected a vector of integers"
        )
    return _Form(np.dtype(dtype.str.replace("i", "u")), offset, shape[0], is_raw=False)


def _llmc_form(file: Path) -> _Form | None:
    """Return the form of a file with llm.c's header, or None without it."""
    header = np.fromfile(file, "<i4", 3)
    if len(header) < 3 or file.stat().st_size < _LLMC_HEADER_BYTES:
        return None
    magic, version, n_tokens = header.tolist()
    if (magic, version) not in _LLMC_DTYPES:
        return None
    dtype = np.dtype(_LLMC_DTYPES[magic, version])
    return _Form(dtype, _LLMC_HEADER_BYTES, n_tokens, is_raw=False)


def _check_looks_like(file: Path, form: _Form) -> None:
    """Raise if a file read as uint16 alternates between ids and nearly zeros: it is uint32."""
    pairs = np.fromfile(file, form.dtype, min(form.n_tokens, 1 << 16) // 2 * 2).reshape(-1, 2)
    if form.dtype.itemsize != 2 or len(pairs) < 32:
        return
    low, high = pairs.max(axis=0).tolist()
    if high < 16 <= low or high == 0 < low:
        raise ValueError(
            f"{file}: looks like uint32 (every second number of 16 bits is at most {high}); "
            "expected uint16; give --data.id_dtype uint32 (or uint16 if it is)"
        )


def _scan(file: Path, stamp: FileStamp, form: _Form, *, use_cache: bool) -> dict[str, Any]:
    """Return the SHA-256 and the largest id of a file, or a cached result of an earlier scan."""
    cache_file = scan_cache_file(file, "tokens", form.dtype.str, str(form.offset))
    found = load_cached(cache_file, stamp) if use_cache else None
    if found is not None and {"sha256", "largest"} <= found.keys():
        return found
    hasher, largest = hashlib.sha256(), 0
    with file.open("rb") as stream:
        hasher.update(stream.read(form.offset))
        while block := stream.read(_BLOCK_BYTES):
            hasher.update(block)
            whole = len(block) // form.dtype.itemsize * form.dtype.itemsize
            if whole:  # a file that shrinks meanwhile is reported below
                largest = max(largest, int(np.frombuffer(block[:whole], form.dtype).max()))
    check_unchanged(file, stamp)
    found = {"sha256": hasher.hexdigest(), "largest": largest}
    save_cached(cache_file, found, stamp)
    return found
