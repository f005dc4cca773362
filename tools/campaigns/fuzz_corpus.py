"""Fuzzing of corpus files: text, JSON lines, Parquet, compressed or not, and IDX images."""

import gzip
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard
from campaigns.fuzz_kind import Kind
from campaigns.fuzz_mutations import mutate_bytes, mutate_tree, render, spoil_file

from tjx_data import read_idx
from tjx_data.corpora.documents import Malformed
from tjx_data.corpora.files import load_files

MOST_EXPANSION = 200
_RECORDS: list[Any] = [{"text": f"document {n} über the wall", "n": n} for n in range(40)]


def _lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _parquet() -> bytes:
    arrow: Any = pyarrow  # its type stubs export nothing
    sink = arrow.BufferOutputStream()
    table = arrow.table({"text": [record["text"] for record in _RECORDS]})
    arrow.parquet.write_table(table, sink, row_group_size=16, compression="zstd")
    return bytes(sink.getvalue())


def _idx() -> bytes:
    return b"\0\0\x08\x03" + struct.pack(">3I", 5, 4, 3) + bytes(range(60))


def _gzip_bomb() -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(300)) + packer.flush()


def _zstd_bomb() -> bytes:
    return zstandard.ZstdCompressor(level=19).compress(bytes(300 << 20))


_SOUND: dict[str, Callable[[], bytes]] = {
    "a.txt": lambda: b"one text\n<|endoftext|>\nand another\n" * 20,
    "a.jsonl": lambda: _lines(_RECORDS),
    "a.jsonl.gz": lambda: gzip.compress(_lines(_RECORDS), mtime=0),
    "a.jsonl.zst": lambda: zstandard.compress(_lines(_RECORDS)),
    "a.txt.gz": lambda: gzip.compress(b"one text\n<|endoftext|>\nand another\n" * 20, mtime=0),
    "a.parquet": _parquet,
    "a-idx3-ubyte": _idx,
    "a-idx3-ubyte.gz": lambda: gzip.compress(_idx(), mtime=0),
}
_BOMBS = {".gz": _gzip_bomb, ".zst": _zstd_bomb}


class CorpusFile(Kind):
    """Fuzz kind: a file given by `--data.path`."""

    name = "corpus_file"

    def prepare(self, scratch: Path) -> None:
        """Create a file of each format, and decompression bombs."""
        del scratch
        self._sound = {name: make() for name, make in _SOUND.items()}
        self._bombs = {end: make() for end, make in _BOMBS.items()}

    def build(self, steps: Sequence[Random], folder: Path) -> None:
        """Write a file and mutate its bytes, or its records before compression."""
        name = steps[0].choice(sorted(_SOUND)) if steps else "a.jsonl"
        data = self._sound[name]
        file = folder / name
        for step in steps:
            kind = step.randrange(12)
            if kind == 0 and file.suffix in self._bombs:
                data = self._bombs[file.suffix] + (data if step.random() < 0.5 else b"")
            elif kind <= 3 and "jsonl" in name:
                data = self._packed(name, step)
            elif kind == 4 and "idx" in name and file.suffix != ".gz":
                at = 4 * step.randrange(4)
                data = data[:at] + step.randbytes(4) + data[at + 4 :]
            elif kind == 5 and step.random() < 0.3:
                file.write_bytes(data)
                spoil_file(file, step, may_be_large=False)  # a large file is a valid corpus
                return
            else:
                data = mutate_bytes(data, step)
        file.write_bytes(data)

    def _packed(self, name: str, random: Random) -> bytes:
        lines = [
            render(mutate_tree(record, random), random).replace(b"\n", b" ")
            if random.random() < 0.3
            else json.dumps(record).encode()
            for record in _RECORDS
        ]
        data = b"\n".join(lines)
        if name.endswith(".gz"):
            return gzip.compress(data, mtime=0)
        return zstandard.compress(data) if name.endswith(".zst") else data

    def check(self, folder: Path) -> None:
        """Read the whole file."""
        file = next(folder.iterdir(), folder / "a.jsonl")
        if "idx" in file.name:
            array = read_idx(file)
            assert array.size * array.dtype.itemsize <= max(
                64 << 20, MOST_EXPANSION * file.stat().st_size
            )
            assert array.dtype in (np.uint8, np.int8, np.int16, np.int32)
            return
        documents = load_files(file)
        found = [document for part in documents.parts() for document in part.read()]
        assert found
        assert all(isinstance(each, str | Malformed) for each in found)
        if file.suffix == ".jsonl":
            lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
            assert len(lines) == len(found)
            for line, each in zip(lines, found, strict=True):
                if isinstance(each, str):
                    assert json.loads(line)["text"] == each
