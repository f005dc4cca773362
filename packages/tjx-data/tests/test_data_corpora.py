"""Corpora: local text files, and Python's own documentation."""

import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tjx_data import load_corpus, load_files
from tjx_data.corpora import python_docs
from tjx_data.corpora.formats import SEPARATOR


def test_python_docs_are_documents_in_a_fixed_order() -> None:
    documents = list(load_corpus("python-docs"))
    assert documents == list(load_corpus("python-docs"))
    assert len(documents) > 1000
    assert sum(map(len, documents)) > 1_000_000
    assert len(set(documents)) == len(documents)
    assert all(len(text) >= python_docs.MIN_CHARACTERS for text in documents)
    assert any("Serialize ``obj`` to a JSON formatted ``str``" in text for text in documents)
    assert any(text.startswith('The "assert" statement') for text in documents)
    assert not any("turtledemo" in text and "idlelib" in text for text in documents)


def test_python_docs_take_whole_definitions_and_skip_unreadable_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "A docstring that is long enough to be kept."
    (tmp_path / "b.py").write_text(
        f'"""Module b. {long}"""\nif 1:\n  class C:\n    """C. {long}"""\n'
        f'    def f(self):\n      """f. {long}"""\n\ndef g():\n  """Short."""\n'
        f'def h():\n  """Module b. {long}"""\n'
    )
    (tmp_path / "a.py").write_text(f'def first():\n  """\n    first.\n      {long}\n  """\n')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""')
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
    for folder in ("test", "site-packages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.py").write_text(f'"""Excluded. {long}"""')
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(python_docs, "_topics", lambda: ["a topic that is long enough to be kept"])
    assert python_docs.documents.__wrapped__() == (
        "a topic that is long enough to be kept",
        f"first.\n  {long}",
        f"Module b. {long}",
        f"C. {long}\n\nf. {long}",
    )


@given(
    st.lists(st.text(st.sampled_from("ab<|>eé\n"), max_size=30), min_size=1, max_size=5),
    st.integers(1, 9),
)
def test_separators_split_documents_wherever_blocks_end(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], block: int
) -> None:
    file = tmp_path_factory.mktemp("files") / "stories.txt"
    file.write_text(SEPARATOR.join(["x", *texts]), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tjx_data.corpora.decompression.BLOCK_BYTES", block)
        documents = list(load_files(file))
    expected = [text.strip("\n") for text in texts[:-1]]
    # The end of the file is no separator, and text after a separator may be empty.
    if last := texts[-1].lstrip("\n"):
        expected.append(last)
    assert documents == ["x", *expected]


def test_files_come_in_order_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("zwei\r\n\n é".encode())
    (tmp_path / "a [1].txt").write_bytes(b"\none\n")
    assert list(load_files(tmp_path / "*.txt")) == ["\none\n", "zwei\r\n\n é"]
    assert list(load_files(tmp_path / "a [1].txt")) == ["\none\n"]


def test_all_invalid_files_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n")
    (tmp_path / "latin.txt").write_bytes(b"x" * (1 << 20) + b"caf\xe9 noir")
    (tmp_path / "cut.txt").write_bytes("é".encode()[:1])
    (tmp_path / "good.txt").write_bytes(b"good")
    with pytest.raises(ValueError, match=r"empty\.txt: is empty") as error:
        load_files(str(tmp_path / "*.txt"))
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "cut.txt: not UTF-8 text at byte 0" in lines[0]
    assert f"latin.txt: not UTF-8 text at byte {(1 << 20) + 3}" in lines[1]
    assert "blank.txt: holds only white space" in lines[2]
    with pytest.raises(ValueError, match="matches no file"):
        load_files(tmp_path / "*.md")
    with pytest.raises(ValueError, match="no such file"):
        load_files(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"cut\.txt: not UTF-8"):
        load_files(tmp_path)


def test_empty_files_among_others_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good.txt").write_bytes(b"good")
    alone = load_files(tmp_path / "*.txt")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b" \n")
    both = load_files([tmp_path / "*.txt", tmp_path / "*.jsonl"])
    assert list(both) == list(alone) == ["good"]
    assert "empty.txt: is empty; expected text; left out" in caplog.text
    assert "blank.jsonl: holds only white space" in caplog.text
    with pytest.raises(ValueError, match=r"empty\.txt: is empty"):
        load_files(tmp_path / "empty.txt")


def test_unknown_corpus_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean wikitext-103"):
        load_corpus("wikitext103")
