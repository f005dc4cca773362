"""Folders, templates, Arrow files, tar archives, and datasets of the hub by name."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tjx_data import DataConfig, HubError, Malformed, load_corpus, load_files, open_or_prepare
from tjx_data.corpora import containers, hub
from tjx_data.corpora.registry import corpus_source, find_corpus, parse_hub_name
from tjx_data.prepared.index import read_index

RECORDS: list[dict[str, Any]] = [
    {"title": f"T{n}", "text": f"text {n} é", "year": 1900 + n} for n in range(7)
]
TEXTS = [record["text"] for record in RECORDS]
TEMPLATE = "{title} ({year})\\n{text}"
RENDERED = [f"T{n} ({1900 + n})\ntext {n} é" for n in range(7)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def write_tar(file: Path, members: dict[str, bytes] | None = None) -> None:
    """Write an archive as WebDataset does, with other members among the records."""
    if members is None:
        members = {f"{n:03}.json": json.dumps(record).encode() for n, record in enumerate(RECORDS)}
        members = {"000.jpg": b"\0" * 999, **members}
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    packed = gzip.compress(content.getvalue()) if file.suffix == ".gz" else content.getvalue()
    file.write_bytes(packed)


def write_jsonl(file: Path) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))


def write_table(file: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist(RECORDS)
    if file.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, file, row_group_size=3)
        return
    opener = pa.ipc.new_file if "file" in file.name else pa.ipc.new_stream
    with opener(str(file), table.schema) as writer:
        for batch in table.to_batches(max_chunksize=2):
            writer.write_batch(batch)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": write_jsonl, "a.parquet": write_table, "a_file.arrow": write_table,
    "a_stream.arrow": write_table, "a.tar": write_tar, "a.tar.gz": write_tar,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_has_fields_and_templates(folder: Path, name: str) -> None:
    WRITERS[name](folder / name)
    assert list(load_files(folder / name)) == TEXTS
    rendered = load_files(folder / name, text_field=TEMPLATE)
    assert list(rendered) == RENDERED
    assert rendered.source["text_field"] == TEMPLATE
    assert rendered.source["files_sha256"] != load_files(folder / name).source["files_sha256"]
    with pytest.raises(ValueError, match=r"(column|field) 'none'"):
        load_files(folder / name, text_field="{title} {none}")


def test_folder_is_its_files_in_order_of_their_paths(folder: Path) -> None:
    (folder / "b").mkdir()
    (folder / ".git").mkdir()
    for name, text in (
        ("b/1.txt", "one"), ("b/2.md", "two"), ("a.txt", "zero"), ("c.txt.gz", "three"),
        (".hidden.txt", "no"), (".git/x.txt", "no"), ("code.py", "no"), ("dataset_info.json", ""),
    ):  # fmt: skip
        content = text.encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    write_tar(folder / "d.tar", {"x.txt": b"four", "y.bin": b"no"})
    assert list(load_files(folder)) == ["zero", "one", "two", "three", "four"]
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder without text; expected files in"):
        load_files(folder / "empty")


def test_malformed_members_are_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_MEMBER_BYTES", 50)
    members = {
        "a.txt": b"good", "b.txt": b"\xff", "c.json": b"[1]", "d.json": b"{", "e.json": b"{}",
        "f.txt": b"x" * 51, "g.json": b'{"text": null}', "h.TXT": b"last",
    }  # fmt: skip
    write_tar(folder / "a.tar", members)
    (part,) = load_files(folder / "a.tar").parts()
    found = list(part.read())
    assert [record for record in found if isinstance(record, str)] == ["good", "last"]
    reasons = {r.line: r.reason for r in found if isinstance(r, Malformed)}
    assert sorted(reasons) == [2, 3, 4, 5, 6, 7]
    for number, reason in enumerate(
        ("not UTF-8 at byte 0", "holds an array, not an object", "'d.json'", "has no field 'text'",
         "has 51 bytes; at most 50", "field 'text' holds null"), 2
    ):  # fmt: skip
        assert reason in reasons[number]


@pytest.mark.parametrize("name", ["a.tar", "a_file.arrow", "a_stream.arrow"])
def test_damaged_file_is_a_clear_error(folder: Path, name: str) -> None:
    file = folder / name
    WRITERS[name](file)
    content = file.read_bytes()
    # Also at the border of a member, which the library takes for the end of an archive.
    cuts = {100, len(content) // 2, len(content) - 40} | ({512 * 6} if name == "a.tar" else set())
    for cut in cuts:
        file.write_bytes(content[:cut])
        if name == "a.tar" and cut == len(content) - 40:
            continue  # the padding of an archive
        if name == "a_stream.arrow" and cut == len(content) - 40:
            continue  # only the mark of the end
        with pytest.raises(ValueError, match=rf"{name}: .*(truncated|damaged)"):
            list(load_files(file))
    file.write_bytes(b"no such format " * 100)
    with pytest.raises(ValueError, match=rf"{name}: .*(truncated|damaged)"):
        list(load_files(file))


def test_archive_without_text_is_refused(folder: Path) -> None:
    write_tar(folder / "a.tar", {"a.jpg": b"x", "b.cls": b"3"})
    with pytest.raises(ValueError, match=r"a\.tar: holds no text"):
        load_files(folder / "a.tar")


@pytest.mark.parametrize("field", ["{", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "}}"])
def test_template_of_more_than_fields_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match="text_field: got"):
        DataConfig(text_field=field)


COMMIT = "a1" * 20


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hub:o/n", ("o/n", None, "train", None)),
        ("hub:n:test", ("n", None, "test", None)),
        ("hub:o/n:en", ("o/n", "en", "train", None)),
        ("hub:o/n:en:validation", ("o/n", "en", "validation", None)),
        ("hub:o/n:train:extra", ("o/n", "train", "extra", None)),
        (f"hub:o/n.x-1:20231101.en@{COMMIT}", ("o/n.x-1", "20231101.en", "train", COMMIT)),
    ],
)
def test_hub_names(name: str, expected: tuple[str | None, ...]) -> None:
    entry = parse_hub_name(name)
    assert (entry.repo, entry.config, entry.split, entry.revision) == expected
    assert find_corpus(name) == entry
    config = DataConfig(mixture=f"{name}=0.5,python-docs=0.5")
    assert config.weights == {name: 0.5, "python-docs": 0.5}
    assert not config.is_path(name)
    assert DataConfig(corpus=name, tokenizer="auto").tokenizer_kind == "gpt2"


@pytest.mark.parametrize(
    "name", ["hub:", "hub:o/n@main", "hub:o/n:a:b:c", "hub:../n", "hub:/n", "hub:o/n/x", "hub:.."]
)
def test_invalid_hub_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected hub:OWNER/NAME"):
        DataConfig(corpus=name)


def test_dataset_of_the_hub_is_prepared_by_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is replaced by a local folder in its format."""
    pytest.importorskip("datasets")
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    (folder / "repo").mkdir()
    write_jsonl(folder / "repo" / "train.jsonl")
    asked: list[tuple[object, ...]] = []
    original = hub.load_rows

    def load_rows(name: str, repo: str, *where: str | None, revision: str, **others: Any) -> object:
        asked.append((repo, *where, revision))
        return original(name, str(folder / "repo"), *where, revision=None, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(hub, "load_rows", load_rows)
    monkeypatch.setattr(hub, "latest_commit", lambda *_: COMMIT)
    name = "hub:owner/name"
    assert list(load_corpus(name)) == TEXTS
    assert asked == [("owner/name", None, "train", COMMIT)]
    assert corpus_source(name)["revision"] == COMMIT
    assert corpus_source(f"{name}@{'b2' * 20}")["revision"] == "b2" * 20
    assert list(load_corpus(name, text_field=TEMPLATE)) == RENDERED
    with pytest.raises(ValueError, match="has no field 'body'; expected one of title, text"):
        load_corpus(name, text_field="{body}")
    config = DataConfig(
        corpus=name, text_field=TEMPLATE, tokenizer="byte", holdout_fraction=0.4,
        cache_dir=str(folder / "sets"),
    )  # fmt: skip
    directory = open_or_prepare(config)
    assert directory.parent == folder / "sets"
    index = read_index(directory)
    assert sum(split.n_documents for split in index.splits.values()) == 7
    assert index.source["text_field"] == TEMPLATE


def test_newest_commit_needs_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match=r"hub:o/missing' names no commit.*give @COMMIT"):
        load_corpus("hub:o/missing")
