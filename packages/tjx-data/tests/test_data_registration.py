"""Corpora of other packages are prepared and cached like the built-in ones."""

from pathlib import Path

import pytest

from tjx_data import DataConfig, load_corpus, open_or_prepare, register_corpus
from tjx_data.corpora.registry import CORPORA


def test_registered_corpus_is_prepared_again_for_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CORPORA, "counting", CORPORA["python-docs"])  # removed after the test
    texts = [f"{n} and {n + 1} are numbers in a row" for n in range(40)]
    folders = []
    for version in ("1", "1", "2"):
        register_corpus("counting", lambda: texts, version=version, licence="CC0")
        config = DataConfig(corpus="counting", tokenizer="byte", cache_dir=str(tmp_path))
        folders.append(open_or_prepare(config))
    assert folders[0] == folders[1] != folders[2]
    assert '"licence": "CC0"' in (folders[2] / "index.json").read_text()
    assert list(load_corpus("counting")) == texts
    assert DataConfig(mixture="counting=0.5,python-docs=0.5").weights["counting"] == 0.5


@pytest.mark.parametrize("name", ["python-docs", "mnist", "a:b", "a=b", ""])
def test_other_names_are_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=r"name: got .*; expected a name without"):
        register_corpus(name, lambda: [], version="1")


def test_unknown_corpus_names_the_register_function() -> None:
    with pytest.raises(ValueError, match=r"add it with tjx_data\.register_corpus"):
        DataConfig(corpus="xyz")
