"""Named corpora: the hub, replaced by a local folder in its format, and errors without network."""

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tjx_data import (
    CORPORA,
    DataConfig,
    HubError,
    Tokenizer,
    TokenLoader,
    evaluation_corpus,
    load_corpus,
    open_or_prepare,
    read_index,
)
from tjx_data.corpora import hub
from tjx_data.corpora.corpus_kinds import DownloadCorpus, HubCorpus
from tjx_data.corpora.documents import Malformed
from tjx_data.corpora.registration import _BUILT_IN
from tjx_data.corpora.registry import corpus_source, join_wikitext

REVISION, ANOTHER = "0" * 40, "1" * 40


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        import datasets.config
    except ImportError:
        return
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the hub's address to a port without a server."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def _repository(folder: Path, rows: list[object], field: str = "text") -> Path:
    folder.mkdir()
    lines = [json.dumps({field: row, "url": "x"}) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


def _entry(repo: Path, **others: object) -> HubCorpus:
    return HubCorpus(licence="none", tokenizer="gpt2", repo=str(repo), **others)  # type: ignore[arg-type]


def test_every_corpus_is_pinned_and_names_its_licence() -> None:
    for name in _BUILT_IN & CORPORA.keys():  # other tests register corpora
        entry, source = CORPORA[name], corpus_source(name)
        assert len(source["licence"]) > 5
        pins = ("revision", "sha256", "python", "additions", "tiny-chat")
        [pin] = [source[key] for key in pins if key in source]
        assert re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}|\w+ 3\.\S+|1", pin), name
        assert entry.tokenizer in ("bpe", "gpt2")
    large = {
        name for name, entry in CORPORA.items() if isinstance(entry, HubCorpus) and entry.streamed
    }
    assert large == {"openwebtext", "c4", "fineweb-edu", "wikipedia"}


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize("corpus", ["wikitext-2", "fineweb-edu", "shakespeare"])
def test_unreachable_hub_raises_within_seconds_with_alternatives(
    corpus: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("datasets")
    if corpus == "shakespeare":
        monkeypatch.setitem(CORPORA, corpus, _download("http://127.0.0.1:9/input.txt", b""))
    begin = time.monotonic()
    with pytest.raises(HubError, match=rf"'{corpus}'.*cannot be reached") as error:
        load_corpus(corpus)
    assert time.monotonic() - begin < 10
    assert f"not in the cache {tmp_path}" in str(error.value)
    assert "--data.corpus python-docs" in str(error.value)
    assert "--data.path FILE_OR_GLOB" in str(error.value)
    assert "licence" not in caplog.text  # nothing was downloaded


@pytest.mark.usefixtures("unreachable")
def test_unreachable_hub_tokenizer_raises_within_seconds() -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(HubError, match=r"tokenizer: got 'nobody/gpt2'.*--data.tokenizer bpe"):
        Tokenizer.load("nobody/gpt2")


@pytest.mark.parametrize("corpus", ["tinystories", "openwebtext"])
def test_offline_variable_prevents_network_access(
    corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "reachable", lambda url: pytest.fail(f"requested {url}"))
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
        load_corpus(corpus)


def test_cached_tokenizer_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the hub's cache layout by hand."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "reachable", lambda url: pytest.fail(f"requested {url}"))
    repo = tmp_path / "models--nobody--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    (repo / "snapshots" / REVISION).mkdir(parents=True)
    from tjx_data import char_tokenizer

    char_tokenizer(["abc"]).save(repo / "snapshots" / REVISION / "tokenizer.json")
    assert Tokenizer.load("nobody/tiny").encode("cab") == [2, 0, 1]


@pytest.mark.parametrize("streamed", [False, True])
def test_hub_rows_become_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """Read a local folder in the hub's format."""
    pytest.importorskip("datasets")
    repo = _repository(tmp_path / "repo", [" = A = \n", None, " one \n", " = B = \n"])
    null = Malformed(str(repo), 2, "field 'text' holds null, not a string")

    def records(entry: HubCorpus) -> list[str | Malformed]:
        monkeypatch.setitem(CORPORA, "local", entry)
        documents = load_corpus("local")
        twice = [[record for part in documents.parts() for record in part.read()] for _ in "12"]
        assert twice[0] == twice[1]
        assert documents.source["licence"] == "none"
        return twice[0]

    rows: list[str | Malformed] = [" = A = \n", null, " one \n", " = B = \n"]
    assert records(_entry(repo, streamed=streamed)) == rows
    joined = records(_entry(repo, streamed=streamed, join=join_wikitext))
    assert joined == [null, " = A = \n one \n", " = B = \n"]
    assert bool([*(tmp_path / "datasets").rglob("*.arrow")]) != streamed  # nothing is cached
    monkeypatch.setitem(CORPORA, "local", _entry(repo, field="txt", streamed=streamed))
    with pytest.raises(ValueError, match=r"no field 'txt'; expected one of text, url"):
        load_corpus("local")


def test_official_splits_are_named_and_used_for_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    repo = _repository(tmp_path / "repo", ["one text", "another text"])
    (repo / "validation.jsonl").write_text(json.dumps({"text": "held out: xyz"}) + "\n")
    monkeypatch.setitem(CORPORA, "local", _entry(repo, held_out=("validation",)))
    assert list(load_corpus("local")) == list(load_corpus("local:train"))
    assert list(load_corpus("local:train")) == ["one text", "another text"]
    assert list(load_corpus("local:validation")) == ["held out: xyz"]
    with pytest.raises(ValueError, match="expected an official split of local: train or valid"):
        load_corpus("local:test")
    assert evaluation_corpus("local") == "local:validation"
    assert evaluation_corpus("local:train") == "local:train"

    for tokenizer in ("byte", "char"):  # the alphabet is that of both splits
        config = DataConfig(corpus="local", tokenizer=tokenizer)
        folder = open_or_prepare(config, tmp_path / "sets")
        index = read_index(folder)
        assert index.holdout == "official"
        assert index.source["held_out"] == "validation"
        assert [index.splits[split].n_documents for split in ("train", "validation")] == [2, 1]
        loader = TokenLoader(folder, split="validation", seq_len=4, batch_size=1)
        assert Tokenizer.load(folder).decode(loader.document(0)) == "held out: xyz"
    by_hash = DataConfig(corpus="local", holdout="documents")
    assert by_hash.holdout_of("local") == "documents"
    assert DataConfig(corpus="local:validation").holdout_of("local:validation") == "documents"
    assert DataConfig(path="local").holdout_of("local") == "documents"
    with pytest.raises(ValueError, match="'python-docs' has no official validation split"):
        DataConfig(corpus="python-docs", holdout="official")
    with pytest.raises(ValueError, match="mixture: got 'local:test'"):
        DataConfig(mixture="local:test=1,local=2")


def test_parquet_folder_is_read_with_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    repo = tmp_path / "repo"
    configs = []
    for config in ("en", "de"):
        (repo / config).mkdir(parents=True)
        table = pyarrow.table({"text": [f"{config} {number}" for number in range(3)]})
        parquet.write_table(table, repo / config / "train-0.parquet")
        configs.append(f"- config_name: {config}\n  data_files: {config}/*.parquet\n")
    (repo / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    for streamed in (False, True):
        monkeypatch.setitem(CORPORA, "local", _entry(repo, config="de", streamed=streamed))
        assert list(load_corpus("local")) == ["de 0", "de 1", "de 2"]


@pytest.mark.parametrize("streamed", [False, True])
def test_cache_is_read_offline_if_it_holds_the_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """Fill the library's cache layout by hand; the library would accept any revision in it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = _repository(tmp_path / "tiny", ["one", "two"])
    made = datasets.load_dataset(str(folder), split="train", cache_dir=tmp_path / "made")
    found = Path(made.cache_files[0]["filename"]).parent
    cached = tmp_path / "datasets" / "nobody___tiny" / "default" / "0.0.0" / REVISION
    shutil.copytree(found, cached)
    info = json.loads((cached / "dataset_info.json").read_text())
    (cached / "dataset_info.json").write_text(json.dumps({**info, "config_name": "default"}))
    for revision in (REVISION, ANOTHER):
        entry = _entry(Path("nobody/tiny"), revision=revision, streamed=streamed)
        monkeypatch.setitem(CORPORA, "tiny", entry)
        if revision == REVISION:
            assert list(load_corpus("tiny")) == ["one", "two"]
            continue
        with pytest.raises(HubError, match=f"revision {ANOTHER}.* is not in the cache") as error:
            load_corpus("tiny")
        assert f"found revision {REVISION}" in str(error.value.__cause__)


def test_interrupted_stream_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[dict[str, str]]):
        column_names = None  # as of streamed rows without declared fields

        def select_columns(self, names: list[str]) -> "Rows":
            return self

        def __iter__(self) -> Iterator[dict[str, str]]:
            yield {"text": "one"}
            raise ConnectionError("Server Disconnected")

    monkeypatch.setattr(hub, "load_rows", lambda *_, **__: Rows())
    monkeypatch.setitem(CORPORA, "local", _entry(tmp_path, streamed=True))
    with pytest.raises(HubError, match=r"'local'.*stopped after 1 rows: Server Disconnected"):
        list(load_corpus("local"))


def test_licence_is_shown_at_the_first_download_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("datasets")
    caplog.set_level(logging.WARNING)
    monkeypatch.setitem(CORPORA, "local", _entry(_repository(tmp_path / "repo", ["one"])))
    for _ in range(2):
        list(load_corpus("local"))
    shown = [record.getMessage() for record in caplog.records if "licence" in record.getMessage()]
    assert shown == [f"corpus 'local' is downloaded from {tmp_path / 'repo'}; its licence: none"]


def _download(url: str, content: bytes) -> DownloadCorpus:
    digest = hashlib.sha256(content).hexdigest()
    return DownloadCorpus(licence="none", tokenizer="bpe", url=url, sha256=digest)


def test_download_is_verified_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub, "reachable", lambda _: True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    served = tmp_path / "input.txt"
    served.write_bytes(b"Speak, speak.")
    monkeypatch.setitem(CORPORA, "play", _download(served.as_uri(), b"something else"))
    with pytest.raises(ValueError, match="its content changed"):
        load_corpus("play")
    monkeypatch.setitem(CORPORA, "play", _download(served.as_uri(), b"Speak, speak."))
    assert list(load_corpus("play")) == ["Speak, speak."]
    served.unlink()  # the second time it comes from the cache
    documents = load_corpus("play")
    assert list(documents) == ["Speak, speak."]
    assert documents.source["sha256"] == hashlib.sha256(b"Speak, speak.").hexdigest()
    assert caplog.text.count("its licence: none") == 1
