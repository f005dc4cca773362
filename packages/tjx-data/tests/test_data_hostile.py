"""Untrusted files: claimed sizes are checked before memory is allocated."""

import gzip
import hashlib
import io
import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tjx_data import Tokenizer, TokenLoader, byte_tokenizer, char_tokenizer, prepare, read_idx
from tjx_data.bounded_io import MAX_UNPACK_RATIO, MIN_UNPACK_LIMIT_BYTES, read_json_object
from tjx_data.corpora.files import load_files
from tjx_data.errors import DataError
from tjx_data.prepared.index import MAX_INDEX_BYTES, read_index
from tjx_data.prepared.inspection import describe, document_lengths
from tjx_data.prepared.npz import read_arrays
from tjx_data.prepared.packing import open_packing, packing_file
from tjx_data.tokenization.file_formats import MAX_FILE_BYTES, MAX_VOCAB_SIZE

MAX_MEMORY_BYTES = 300 << 20  # far less than the bombs below unpack to
DOCUMENTS = [f"the wall of {n} and {n % 7} more" for n in range(40)]

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    tokenizer = char_tokenizer(DOCUMENTS, ("<|endoftext|>",))
    with ThreadPoolExecutor(1) as one:
        prepare(DOCUMENTS, tokenizer, tmp_path / "set", shard_tokens=300, executor=one)
    return tmp_path / "set"


def rewrite(directory: Path, change: Change) -> None:
    """Change an index and recompute its hash, as an attacker can."""
    file = directory / "index.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    change(content)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    sha256 = hashlib.sha256(canonical.encode()).hexdigest()
    file.write_text(json.dumps({**content, "sha256": sha256}))


def replace_file(directory: Path, name: str, content: bytes) -> None:
    """Replace a file and its hash in the index."""
    (directory / name).write_bytes(content)

    def change(index: dict[str, Any]) -> None:
        for split in index["splits"].values():
            for entry in (*split["shards"], split["starts"]):
                if entry["name"] == name:
                    entry["sha256"] = hashlib.sha256(content).hexdigest()

    rewrite(directory, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["tokenizer"].update(name="../../tokenizer.json"), "tokenizer"),
        (lambda i: i["tokenizer"].update(name="/etc/passwd"), "tokenizer"),
        (lambda i: i["splits"]["train"]["shards"][0].update(name=".."), "splits.train.shards"),
        (lambda i: i["splits"]["train"].update(n_tokens=2**70), "splits.train.n_tokens"),
        (lambda i: i["splits"]["train"].update(n_tokens=-1), "splits.train.n_tokens"),
        (lambda i: i["splits"]["train"].update(n_tokens=1.5), "splits.train.n_tokens"),
        (lambda i: i["splits"]["train"].update(n_tokens=10**12), "train: .* shards of 300 tokens"),
        (
            lambda i: i["splits"]["train"].update(n_documents=10**9),
            "starts: expected 8 bytes for each",
        ),
        (lambda i: i["splits"]["train"]["shards"][0].update(n_bytes=9), "train_00000.bin has 9"),
        (lambda i: i.update(shard_tokens=0), "shard_tokens"),
        (lambda i: i.update(shard_tokens=10**9), "shards of 1000000000"),
        (lambda i: i.update(dtype="object"), "dtype: expected uint16 or uint32"),
        (lambda i: i.update(dtype="uint32"), "dtype: uint32 contradicts vocab_size"),
        (lambda i: i.update(eot_id=10**6), "eot_id: got 1000000"),
        (lambda i: i.update(tokenizer_fingerprint="zz"), "tokenizer_fingerprint"),
        (lambda i: i.update(more=1), "'more': unknown field"),
        (lambda i: i.pop("source"), "source: missing"),
        (lambda i: i["splits"].pop("train"), "splits: expected train and validation"),
        (lambda i: i.update(splits=[]), "splits: expected"),
    ],
)
def test_invalid_index_is_rejected(change: Change, message: str, prepared: Path) -> None:
    rewrite(prepared, change)
    with pytest.raises(ValueError, match=message) as error:
        read_index(prepared)
    assert str(prepared / "index.json") in str(error.value)


def test_rewritten_index_with_the_same_content_is_accepted(prepared: Path) -> None:
    before = read_index(prepared)
    rewrite(prepared, lambda _: None)
    assert read_index(prepared) == before
    assert describe(prepared)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "repeats the key 'a'"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[1]", "got a JSON list"),
        (b"\xff", "utf-8"),
        (b" " * (MAX_INDEX_BYTES + 1), f"at most {MAX_INDEX_BYTES}"),
    ],
)
def test_lenient_json_is_rejected(content: bytes, message: str, prepared: Path) -> None:
    (prepared / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_index(prepared)


def test_pipes_are_rejected_without_blocking(prepared: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json_object(tmp_path / "pipe", 100)
    with pytest.raises(ValueError, match="regular file"):
        read_idx(tmp_path / "pipe")
    with pytest.raises(ValueError, match="regular file"):
        read_arrays(tmp_path / "pipe")
    (prepared / "tokenizer.json").unlink()
    os.mkfifo(prepared / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        describe(prepared)


@pytest.mark.parametrize("starts", [[5, 3], [2**63, 2**63 + 1], [1, 1], [0, 4], [10**6, 10**6]])
def test_invalid_document_positions_are_rejected(starts: list[int], prepared: Path) -> None:
    name = "train_starts.bin"
    right = np.fromfile(prepared / name, "<u8")
    assert (document_lengths(prepared, "train") >= 1).all()
    wrong = right.copy()
    wrong[:2] = starts
    replace_file(prepared, name, wrong.tobytes())
    with pytest.raises(ValueError, match=name):
        document_lengths(prepared, "train")


def rewrite_packing(prepared: Path, **arrays: np.ndarray) -> Path:
    """Replace arrays of a stored packing; return its file."""
    open_packing(prepared, "train", 16)
    file = packing_file(prepared, "train", 16)
    with np.load(file, allow_pickle=False) as held:
        kept = dict(held)
    np.savez(file, allow_pickle=False, **{**kept, **arrays})
    return file


@pytest.mark.parametrize(
    "arrays",
    [
        {"rows": np.array([0, 10**6])},
        {"rows": np.array([0], np.float64)},
        {"starts": np.array([-1])},
        {"starts": np.array([2**62])},
        {"lengths": np.array([2**62])},
        {"lengths": np.array([17])},
        {"lengths": np.array([0])},
    ],
)
def test_packing_beyond_the_stream_is_rejected(
    arrays: dict[str, np.ndarray], prepared: Path
) -> None:
    given = arrays
    if "rows" not in arrays:  # one row of one chunk, with one invalid number
        one = {"rows": np.array([0, 1]), "starts": np.array([0]), "lengths": np.array([3])}
        rewrite_packing(prepared, **one)
        assert open_packing(prepared, "train", 16).n_rows == 1
        given = {**one, **arrays}
    file = rewrite_packing(prepared, **given)
    with pytest.raises(ValueError, match="damaged"):
        TokenLoader(prepared, seq_len=16, batch_size=2, packing="documents")
    file.unlink()
    assert TokenLoader(prepared, seq_len=16, batch_size=2, packing="documents").batch(0)


def peak_memory(call: Callable[[], object]) -> int:
    """Return the peak of traced memory during a call, in bytes."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_array_header_larger_than_its_data_is_rejected(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i8", "fortran_order": False, "shape": (10**13,)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("rows.npy", header.getvalue())

    def read() -> None:
        with pytest.raises(ValueError, match="claims 80000000000000 bytes of values and has 0"):
            read_arrays(tmp_path / "a.npz")

    assert peak_memory(read) < MAX_MEMORY_BYTES


def test_compressed_arrays_and_pickles_are_rejected(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(10**6))
    with pytest.raises(ValueError, match=r"claims .* bytes of arrays in a file of"):
        read_arrays(tmp_path / "bomb.npz")
    np.savez_compressed(tmp_path / "packed.npz", a=np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match="damaged"):
        read_arrays(tmp_path / "packed.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match="pickled Python objects"):
        read_arrays(tmp_path / "objects.npz")


def test_decompression_bombs_are_rejected(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    size = MIN_UNPACK_LIMIT_BYTES + (64 << 20)
    bombs = {
        "a.txt.gz": gzip.compress(bytes(size)),
        "a.jsonl.zst": zstandard.compress(bytes(size)),
    }
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
        assert MAX_UNPACK_RATIO * len(content) < size

        def read(file: Path = tmp_path / name) -> None:
            with pytest.raises(ValueError, match="decompression bomb") as error:
                load_files(file)
            assert str(file) in str(error.value)

        assert peak_memory(read) < MAX_MEMORY_BYTES


def test_small_text_of_high_compression_is_read(tmp_path: Path) -> None:
    text = "the same line over and over again\n" * 200_000
    packed = gzip.compress(text.encode())
    assert len(text) > MAX_UNPACK_RATIO * len(packed)
    assert len(text) < MIN_UNPACK_LIMIT_BYTES
    (tmp_path / "a.txt.gz").write_bytes(packed)
    (part,) = load_files(tmp_path / "a.txt.gz").parts()
    assert [*part.read()] == [text]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 2**31, 4), "got 0 bytes of values"),
        (b"\0\0\x08\xff" + bytes(1020), "of 255 dimensions"),
        (b"\0\0\x08\x03\0\0", "got 0 of 3 dimensions"),
        (gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2**16, 2**16, 4)), "bomb"),
        (
            gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 4) + bytes(5)),
            "got 5 or more bytes",
        ),
    ],
)
def test_idx_header_larger_than_the_file_is_rejected(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(content)

    def read() -> None:
        with pytest.raises(ValueError, match=message):
            read_idx(tmp_path / "a")

    assert peak_memory(read) < MAX_MEMORY_BYTES


def changed_tokenizer(tmp_path: Path, change: Change) -> Path:
    file = tmp_path / "tokenizer.json"
    byte_tokenizer().save(file)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"]["vocab"].update(x=2**32 - 1), f"at most {MAX_VOCAB_SIZE - 1}"),
        (lambda t: (t["model"]["vocab"].clear(), t["added_tokens"].clear()), "no token"),
        (lambda t: t["model"].update(type="a" * 10**5), "not a tokenizer.json"),
        (
            lambda t: t["model"].update({"unk_token": "[UNK]"}),
            r"got unk_token '\[UNK\]', which has no id",
        ),
    ],
)
def test_tokenizer_with_excessive_ids_is_rejected(
    change: Change, message: str, tmp_path: Path
) -> None:
    file = changed_tokenizer(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(file)
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 2000


def test_a_prepared_set_with_another_tokenizer_is_named(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = char_tokenizer(["a"], ("<|endoftext|>",))
    monkeypatch.setattr(Tokenizer, "load", lambda _: other)
    with pytest.raises(DataError, match=r"training document 0: ids: got \[") as error:
        describe(prepared)
    assert str(prepared) in str(error.value)


def test_tokenizer_without_the_operation_raises_value_error(tmp_path: Path) -> None:
    file = changed_tokenizer(
        tmp_path,
        lambda t: t.update(
            model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}, added_tokens=[]
        ),
    )
    with pytest.raises(ValueError, match="this tokenizer cannot encode"):
        Tokenizer.load(file).encode("b")
    strange = changed_tokenizer(tmp_path, lambda t: t["model"]["vocab"].update({"\u4e00": 300}))
    with pytest.raises(ValueError, match="represents no byte"):
        _ = Tokenizer.load(strange).token_byte_lengths


def test_oversized_tokenizer_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match=f"at most {MAX_FILE_BYTES}"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_parquet_file_that_claims_a_bomb_is_rejected(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["a" * (MIN_UNPACK_LIMIT_BYTES + 1)]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(ValueError, match="decompression bomb"):
        load_files(tmp_path / "a.parquet")


def test_parquet_file_that_repeats_a_text_is_read_in_bounded_memory(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "bomb.parquet"
    table = pyarrow.table({"text": ["a" * (1 << 20)] * 80})
    parquet.write_table(table, file, compression="zstd")
    del table
    assert file.stat().st_size < 2000
    pool = pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    before = pyarrow.default_memory_pool().bytes_allocated()
    most = 0

    def read() -> None:
        nonlocal most
        for document in load_files(file):
            assert len(document) == 1 << 20
            most = max(most, pool.bytes_allocated(), pyarrow.total_allocated_bytes() - before)

    with pytest.raises(ValueError, match="decompression bomb"):
        read()
    assert 0 < most < 20 << 20
