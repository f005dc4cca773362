"""Local files as documents: every format, in independently readable parts."""

import gzip
import json
import os
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import load_files
from tjx_data.corpora import file_scan
from tjx_data.corpora.documents import Documents, Malformed
from tjx_data.corpora.file_scan import FileScan
from tjx_data.corpora.files import FilePart, find_file_problems, find_files
from tjx_data.corpora.formats import SEPARATOR, Format

TEXTS = st.lists(st.text(st.sampled_from('ab<|>e" \\é🙂\r\n'), max_size=40), max_size=12)
SMALL = settings(max_examples=40)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an empty folder next to the cache."""
    place = tmp_path / "files"
    place.mkdir()
    return place


def records_of(documents: Documents) -> list[str | Malformed]:
    """Read all parts as worker processes do: unpickled, in any order."""
    parts = [pickle.dumps(part) for part in documents.parts()]
    assert len({pickle.loads(part).identity for part in parts}) == len(parts)  # noqa: S301
    backwards = [list(pickle.loads(part).read()) for part in reversed(parts)]  # noqa: S301
    return [record for records in reversed(backwards) for record in records]


def lines_of(texts: Sequence[object]) -> bytes:
    return "".join(json.dumps({"id": 0, "text": text}) + "\n" for text in texts).encode()


def write_parquet(file: Path, texts: Sequence[str | None], rows: int = 2, **others: object) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array(texts, pyarrow.string())
    nested = pyarrow.array([{"a": 1, "b": 2}] * len(texts))
    table = pyarrow.table({"nested": nested, "text": column, **others})
    parquet.write_table(table, file, row_group_size=rows)


@given(TEXTS, st.integers(1, 60), st.integers(1, 30))
@SMALL
def test_parts_of_a_text_are_its_documents(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], part: int, block: int
) -> None:
    file = tmp_path_factory.mktemp("files") / "stories.txt"
    clean = [text.strip("\n").replace(SEPARATOR, "") for text in ["first", *texts, "last"]]
    content = f"\n{SEPARATOR}\n\n".join(clean).encode()
    file.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_scan, "PART_BYTES", part)
        patch.setattr("tjx_data.corpora.decompression.BLOCK_BYTES", block)
        documents = load_files(file)
        assert records_of(documents) == clean
        byte_ranges = [one.byte_range for one in documents.parts() if isinstance(one, FilePart)]
    # Each part but the last ends at the first separator after its minimum length.
    mark, cuts = SEPARATOR.encode(), [0]
    while (at := content.find(mark, cuts[-1] + max(0, part - len(mark)))) >= 0:
        cuts.append(at + len(mark))
    assert [(one.start, one.end) for one in byte_ranges] == list(pairwise([*cuts, len(content)]))


@given(TEXTS, st.integers(1, 90), st.integers(1, 30), st.sampled_from(["", ".gz"]))
@SMALL
def test_parts_of_json_lines_are_their_texts(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], part: int, block: int, packed: str
) -> None:
    file = tmp_path_factory.mktemp("files") / f"crawl.jsonl{packed}"
    expected: list[str | Malformed] = ["first", *texts]
    content = lines_of(expected) + b"  \n" + lines_of([None]) + lines_of(["last"])[:-1]
    file.write_bytes(gzip.compress(content) if packed else content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_scan, "PART_BYTES", part)
        patch.setattr("tjx_data.corpora.decompression.BLOCK_BYTES", block)
        documents = load_files(file)
        line = len(texts) + 3
        null = Malformed(str(file), line, "field 'text' holds null, not a string")
        assert records_of(documents) == [*expected, null, "last"]
        n_parts = len(list(documents.parts()))
    assert n_parts == 1 if packed else n_parts >= len(content) // (part + 300)


@given(
    st.lists(st.none() | st.text(max_size=30), min_size=1), st.integers(1, 5), st.integers(1, 99)
)
@SMALL
def test_parts_of_parquet_are_its_column(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str | None], rows: int, part: int
) -> None:
    file = tmp_path_factory.mktemp("files") / "table.parquet"
    write_parquet(file, texts, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tjx_data.corpora.parquet.PART_BYTES", part)
        documents = load_files(file)
    assert records_of(documents) == [
        Malformed(str(file), row, "field 'text' holds null, not a string") if text is None else text
        for row, text in enumerate(texts, 1)
    ]
    if part == 1:
        assert len(list(documents.parts())) == -(-len(texts) // rows)


def test_the_size_of_parquet_is_that_of_its_texts(folder: Path) -> None:
    texts = [str(number) * 1000 for number in range(100, 200)]
    write_parquet(folder / "a.parquet", texts, 10)
    assert load_files(folder / "a.parquet").n_bytes == pytest.approx(300_000, rel=0.3)


def pack(content: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(content)
    zstandard = pytest.importorskip("zstandard")
    half = len(content) // 2  # two frames, as parallel compressors write them
    packer = zstandard.ZstdCompressor()
    packed: bytes = packer.compress(content[:half]) + packer.compress(content[half:])
    return packed


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_file_is_the_same_corpus(folder: Path, ending: str) -> None:
    content = SEPARATOR.join(["eins\n" * 300_000, "zwei é"]).encode()
    (folder / "a.txt").write_bytes(content)
    (folder / f"b.txt{ending}").write_bytes(pack(content, ending))
    plain, packed = load_files(folder / "a.txt"), load_files(folder / f"b.txt{ending}")
    assert records_of(packed) == records_of(plain) == [("eins\n" * 300_000)[:-1], "zwei é"]
    assert packed.source["files_sha256"] == plain.source["files_sha256"]
    assert packed.n_bytes == plain.n_bytes == len(content)
    (folder / f"c.jsonl{ending}").write_bytes(pack(lines_of(["drei", 4]), ending))
    *texts, malformed = records_of(load_files(folder / f"c.jsonl{ending}"))
    assert texts == ["drei"]
    assert isinstance(malformed, Malformed)
    assert malformed.line == 2


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_truncated_or_damaged_compressed_file_is_named(folder: Path, ending: str) -> None:
    packed = pack(os.urandom(3000).hex().encode(), ending)
    for kept in (5, len(packed) // 3, len(packed) - 1):
        (folder / f"cut.txt{ending}").write_bytes(packed[:kept])
        with pytest.raises(ValueError, match=r"cut\.txt\S+: truncated"):
            load_files(folder / f"cut.txt{ending}")
    (folder / f"text.txt{ending}").write_bytes(b"not packed at all")
    with pytest.raises(ValueError, match=r"text\.txt\S+: not (gzip|zstd), or damaged"):
        load_files(folder / f"text.txt{ending}")
    (folder / f"latin.txt{ending}").write_bytes(pack("café".encode("latin-1"), ending))
    with pytest.raises(ValueError, match="not UTF-8 text at byte 3"):
        load_files(folder / f"latin.txt{ending}")


def test_malformed_records_have_file_line_and_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "crawl.ndjson"
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b"[1]",
        b'{"url": "x", "content": "y"}',
        b'{"text": 1}',
        b'{"text": "caf\xe9"}',
        b"",
        b'{"text": "\\ud800"}',
        b"{}",
        b"[" * 100_000,
        b'{"text": "end"}',
    ]
    file.write_bytes(b"\r\n".join(lines))
    reasons = {
        2: "not JSON: ",
        3: "holds an array, not an object",
        4: "has no field 'text'; it has url, content",
        5: "field 'text' holds a number, not a string",
        6: "not UTF-8 at byte 13 of the line",
        8: "field 'text' holds a lone surrogate",
        9: "has no field 'text'; it has none",
        10: "begins an array that does not end in its line",
    }
    for part in (1, 20, 1 << 23):
        monkeypatch.setattr(file_scan, "PART_BYTES", part)
        records = records_of(load_files(file))
        assert [record for record in records if isinstance(record, str)] == ["good", "end"]
        malformed = [record for record in records if isinstance(record, Malformed)]
        assert [record.line for record in malformed] == list(reasons)
        assert all(record.reason.startswith(reasons[record.line]) for record in malformed)
        assert {record.file for record in malformed} == {str(file)}
    assert list(load_files(file)) == ["good", "end"]


def test_the_text_can_be_in_another_field(folder: Path) -> None:
    (folder / "a.json").write_text('{"content": "eins", "text": "x"}\n')
    write_parquet(folder / "b.parquet", ["y"], content=["zwei"], number=[1])
    by_content = load_files(folder / "*", text_field="content")
    assert list(by_content) == ["eins", "zwei"]
    assert by_content.source["text_field"] == "content"
    by_text = load_files(folder / "*")
    assert list(by_text) == ["x", "y"]
    assert by_text.source["files_sha256"] != by_content.source["files_sha256"]
    both = [str(each) for each in find_file_problems(folder / "*", text_field="body")]
    assert len(both) == 2
    assert "has no field 'body'; it has content, text" in both[0]
    assert "has no column 'body'; text_field must be one of nested, text, content" in both[1]
    (wrong,) = find_file_problems(folder / "b.parquet", text_field="number")
    assert "column 'number' holds int64, not strings" in str(wrong)


def test_file_of_another_format_than_its_name_is_rejected(folder: Path) -> None:
    (folder / "array.json").write_text('[\n{"text": "one"},\n{"text": "two"}\n]')
    (folder / "data.parquet").write_text("no table")
    (folder / "data.parquet.gz").write_bytes(gzip.compress(b"no table"))
    write_parquet(folder / "none.parquet", [])
    array, data, packed, none = map(str, find_file_problems(folder / "*"))
    assert "array.json: holds no JSON lines with text: line 1 begins an array" in array
    assert "one object per line" in array
    assert "data.parquet: not Parquet, or damaged" in data
    assert "unpack the file" in packed
    assert "none.parquet: has no rows" in none


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("zstandard", "a.txt.zst", "zstd"), ("pyarrow.lib", "a.parquet", "parquet")],
)
def test_missing_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, extra: str
) -> None:
    (folder / name).write_bytes(b"something")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"pip install 'tjx-data\[{extra}\]'"):
        load_files(folder / name)


def test_overlapping_patterns_give_each_file_once_in_order(folder: Path) -> None:
    for name in ("a.txt", "b.txt", "b, c.txt", "d.md"):
        (folder / name).write_text(name)
    assert list(load_files(f"{folder}/d.md, {folder}/*.txt")) == [
        "d.md",
        "a.txt",
        "b, c.txt",
        "b.txt",
    ]
    twice: list[str | Path] = [folder / "b.txt", f"{folder}/*.txt,{folder}/d.md"]
    assert [file.name for file in find_files(twice)] == ["b.txt", "a.txt", "b, c.txt", "d.md"]
    assert list(load_files(folder / "b, c.txt")) == ["b, c.txt"]
    with pytest.raises(ValueError, match="no such file") as error:
        load_files(f"{folder}/*.txt,{folder}/e.txt,{folder}/*.tex")
    assert len(str(error.value).splitlines()) == 2
    assert "matches no file" in str(error.value)


def test_parts_have_absolute_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a.txt").write_text("one")
    (folder / "b.jsonl").write_bytes(lines_of(["two"]))
    write_parquet(folder / "c.parquet", ["three"])
    monkeypatch.chdir(folder)
    documents = load_files("*")
    monkeypatch.chdir("/")
    assert records_of(documents) == ["one", "two", "three"]


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of scanned files."""
    files: list[str] = []
    original = file_scan._scan

    def record_scan(file: Path, form: Format) -> FileScan:
        files.append(file.name)
        return original(file, form)

    monkeypatch.setattr(file_scan, "_scan", record_scan)
    monkeypatch.setattr(file_scan, "MIN_CACHED_BYTES", 1)
    return files


def write_long_ago(file: Path, content: bytes, second: int = 0) -> None:
    file.write_bytes(content)
    os.utime(file, (1_000_000_000 + second,) * 2)


def test_scan_is_cached_until_the_file_changes(folder: Path, scanned: list[str]) -> None:
    file = folder / "a.jsonl"
    write_long_ago(file, lines_of(["one", "two"]))
    first = load_files(file)
    second = load_files(file)
    assert scanned == ["a.jsonl"]
    assert records_of(first) == records_of(second) == ["one", "two"]
    assert first.source == second.source
    write_long_ago(file, lines_of(["one", "six"]), second=1)  # same size
    assert list(load_files(file)) == ["one", "six"]
    assert len(scanned) == 2
    with pytest.raises(ValueError, match=r"a\.jsonl: changed since the scan"):
        list(first)
    file.write_bytes(lines_of(["new"]))  # its time stamp is too recent to be cached
    assert list(load_files(file)) == list(load_files(file)) == ["new"]
    assert len(scanned) == 4


def test_damaged_cached_scan_is_replaced(folder: Path, scanned: list[str], tmp_path: Path) -> None:
    file = folder / "a.txt"
    write_long_ago(file, SEPARATOR.join(["one", "two"]).encode())
    load_files(file)
    (kept,) = (tmp_path / "cache" / "tjx" / "data" / "scans").iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-9], b"[]", b"{}", whole.replace(b"[0, 19, 1]", b"[0, 18, 1]")):
        assert damaged != whole
        kept.write_bytes(damaged)
        scanned.clear()
        assert list(load_files(file)) == ["one", "two"]
        assert scanned == ["a.txt"]
        assert kept.read_bytes() == whole


def test_file_that_changes_during_the_scan_is_rejected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "a.txt"
    write_long_ago(file, b"one")
    stamps: Iterator[file_scan.FileStamp] = iter(
        [file_scan.file_stamp(file), file_scan.FileStamp(9, time.time_ns(), 1)]
    )
    monkeypatch.setattr(file_scan, "file_stamp", lambda _: next(stamps))
    with pytest.raises(ValueError, match=r"a\.txt: changed during the scan"):
        load_files(file)


def test_real_text_is_the_same_in_every_format(folder: Path) -> None:
    place = os.environ.get("TJX_TEST_DATA")
    if not place:
        pytest.skip("TJX_TEST_DATA does not name the folder of test texts")
    stories = (Path(place) / "tinystories_2M.txt").read_text(encoding="utf-8")
    (folder / "a.txt").write_text(stories, encoding="utf-8")
    texts = list(load_files(folder / "a.txt"))
    assert len(texts) > 1000
    (folder / "b.jsonl").write_bytes(lines_of(texts))
    (folder / "c.jsonl.zst").write_bytes(pack(lines_of(texts), ".zst"))
    write_parquet(folder / "d.parquet", texts, 100)
    for name in ("b.jsonl", "c.jsonl.zst", "d.parquet"):
        assert records_of(load_files(folder / name)) == texts
