"""Files of object stores: downloaded once, in the order of their URLs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tjx_core import ConfigError
from tjx_data import DataConfig, Tokenizer, TokenLoader, load_files, open_sets
from tjx_data.corpora.hub import HubError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe(
        {
            "/books/b.txt": b"two",
            "/books/a.txt": b"one",
            "/books/deep/c.jsonl": b'{"text": "three"}\n',
        }
    )
    yield files
    files.store.clear()


def test_files_of_urls_are_read_in_order(store: Any) -> None:
    assert list(load_files("memory://books/*.txt")) == ["one", "two"]
    assert list(load_files("memory://books/b.txt")) == ["two"]
    assert list(load_files("memory://books")) == ["one", "two", "three"]
    assert list(load_files("memory://books/b.txt,memory://books/a.txt")) == ["two", "one"]


def test_only_new_and_changed_files_are_downloaded(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded: list[str] = []
    get_file = type(store).get_file

    def spy(self: Any, name: str, *rest: Any, **options: Any) -> Any:
        downloaded.append(name)
        return get_file(self, name, *rest, **options)

    monkeypatch.setattr(type(store), "get_file", spy)
    first = load_files("memory://books/*.txt")
    again = load_files("memory://books/*.txt")
    assert downloaded == ["/books/a.txt", "/books/b.txt"]
    assert again.source == first.source
    store.pipe({"/books/b.txt": b"changed"})
    assert list(load_files("memory://books/*.txt")) == ["one", "changed"]
    assert downloaded[2:] == ["/books/b.txt"]


def test_a_set_is_prepared_from_a_url(store: Any, tmp_path: Path) -> None:
    store.pipe({"/corpus/all.txt": b"abcd " * 200})
    config = DataConfig(
        path="memory://corpus/all.txt", tokenizer="byte", cache_dir=str(tmp_path / "sets")
    )
    (folder,) = open_sets(config).values()
    loader = TokenLoader(folder, seq_len=8, batch_size=1)
    assert "abcd" in Tokenizer.load(folder).decode(loader.batch(0)["tokens"][0])


def test_errors_of_urls_name_the_fix(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"path: got 'memory://books/x\*'; this URL has no file"):
        load_files("memory://books/x*")
    with pytest.raises(ConfigError, match="nothing:// needs: pip install 'tjx-data"):
        load_files("nothing://bucket/file.txt")

    with pytest.raises(ConfigError, match="a chain of URLs; expected one"):
        load_files("memory://books::file:///etc/passwd")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("403 Forbidden")

    monkeypatch.setattr(type(store), "get_file", refuse)
    with pytest.raises(
        HubError, match=r"memory://books/a.txt: cannot read: OSError: 403 Forbidden"
    ):
        load_files("memory://books/a.txt")
