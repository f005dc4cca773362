"""Cleaning: repeated spans against brute force, languages by a function, scores in a column."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_data import clean, scored_text
from tjx_data.cleaning import repeated_spans
from tjx_data.cleaning.clean_config import CleanConfig
from tjx_data.cleaning.repeated_spans import Texts, cut_spans, find_repeated_spans
from tjx_data.corpora.files import load_files
from tjx_data.main import main

PLAIN: dict[str, Any] = {"rules": (), "masks": (), "near_duplicates": None}
RNG = random.Random(0)  # noqa: S311  test data


def identify(text: str) -> tuple[str, float]:
    """Identify two languages by a letter."""
    return ("en" if "w" in text else "de"), 0.5 if "?" in text else 0.9


def _words(n_words: int) -> str:
    words = ("".join(RNG.choices("bcdfglmnprst\u00e9\u4e2d", k=5)) for _ in range(n_words))
    return " ".join(words)


def _kept(folder: Path) -> list[str]:
    lines = (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def _brute_force(documents: list[bytes], is_kept: list[bool], n: int) -> list[bool]:
    """Mark the bytes of windows that equal an earlier one, by comparing the windows."""
    first: dict[bytes, int] = {}
    marks: list[bool] = []
    for document, kept in zip(documents, is_kept, strict=True):
        offset, own = len(marks), [False] * len(document)
        for start in range(len(document) - n + 1 if kept else 0):
            window = document[start : start + n]
            if offset + start - first.setdefault(window, offset + start) >= n:
                own[start : start + n] = [True] * n
        marks += own
    return marks


@given(
    st.lists(st.tuples(st.text("ab", max_size=120), st.booleans()), min_size=1, max_size=6),
    st.integers(6, 13),
    st.sampled_from([16, 50, 1 << 12]),
    st.integers(0, 6),
)
@settings(max_examples=150)
def test_repeated_spans_are_those_of_brute_force(
    given_: list[tuple[str, bool]], n: int, chunk: int, cut: int
) -> None:
    documents = [text.encode() for text, _ in given_]
    is_kept = [kept for _, kept in given_]

    def parts() -> Iterator[Texts]:
        for own in (slice(None, cut), slice(cut, None)):
            yield Texts(
                np.frombuffer(b"".join(documents[own]), np.uint8),
                np.array([len(text) for text in documents[own]], np.int64),
                np.array(is_kept[own], bool),
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated_spans, "_CHUNK", chunk)
        spans = find_repeated_spans(parts, n)
    found = np.zeros(sum(map(len, documents)), bool)
    for start, end in spans:
        assert end - start >= n
        assert not found[start:end].any()
        found[start:end] = True
    assert found.tolist() == _brute_force(documents, is_kept, n)


def test_planted_spans_are_removed_and_the_first_kept(tmp_path: Path) -> None:
    spans = [_words(40) for _ in range(5)]
    # Neighbors of the span: characters of 3 bytes, of which the first 2 are the same.
    marks = [chr(0x4E00 + i) for i in range(30)]
    texts = [f"{_words(30)}{marks[i]}{spans[i % 5]}{marks[i]}{_words(30)}" for i in range(30)]
    texts += [spans[3], _words(20)]  # all of a document is a repeated span
    report = clean(texts, tmp_path / "out", CleanConfig(**PLAIN, repeated_spans=100))
    kept = _kept(tmp_path / "out")
    assert len(kept) == 31
    assert kept[:5] == texts[:5]
    for i in range(5, 30):
        assert kept[i] == texts[i].replace(spans[i % 5], "")
    assert report["dropped"]["repeated"]["documents"] == 1
    cut = report["cut"]
    assert (cut["documents"], cut["spans"]) == (25, 25)
    assert cut["examples"][0] == spans[0]
    assert report["kept"]["bytes"] == sum(len(text.encode()) for text in kept)
    n_dropped = report["dropped"]["repeated"]["bytes"]
    assert report["read"]["bytes"] == report["kept"]["bytes"] + cut["bytes"] + n_dropped
    assert "25 of" in (tmp_path / "out" / "report.html").read_text()


def test_duplicates_are_dropped_before_spans_are_searched(tmp_path: Path) -> None:
    text = _words(60)
    report = clean([text, text], tmp_path / "out", CleanConfig(**PLAIN, repeated_spans=100))
    assert report["cut"]["spans"] == 0
    assert report["dropped"]["exact-duplicate"]["documents"] == 1


def test_characters_are_never_cut() -> None:
    text = "a\u00e9\u4e2d\U0001f600z"
    content = text.encode()
    for start in range(len(content)):
        for end in range(start, len(content) + 1):
            left = cut_spans(content, np.array([[start, end]])).decode()
            borders = [len(text[:i].encode()) for i in range(len(text) + 1)]
            inside = [i for i, at in enumerate(borders) if start <= at <= end]
            expected = text[: inside[0]] + text[inside[-1] :] if inside else text
            assert left == expected


def test_languages_are_identified_by_a_named_function(tmp_path: Path) -> None:
    texts = ["who was it", "ich bin es", "was it you?"]
    config = CleanConfig(
        **PLAIN, languages=("en", "fr"), language_identifier=f"{__name__}:identify"
    )
    report = clean(texts, tmp_path / "out", config)
    assert _kept(tmp_path / "out") == texts[:1]
    assert report["dropped"]["language"]["documents"] == 2
    with pytest.raises(ValueError, match=r"language_identifier: got 'none:here' .*module:function"):
        clean(
            texts, tmp_path / "b", CleanConfig(languages=("en",), language_identifier="none:here")
        )
    wrong = CleanConfig(**PLAIN, languages=("en",), language_identifier="builtins:len")
    with pytest.raises(ValueError, match=r"got 10 for a text; expected \(language, probability\)"):
        clean(texts, tmp_path / "b", wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"languages": ("en",)}, "languages: got en with language_identifier None; expected both"),
        ({"repeated_spans": 8}, "repeated_spans: got 8; expected at least 32 bytes"),
        ({"min_score": float("nan")}, "min_score: got nan"),
        ({"min_language_score": 2}, "min_language_score: got 2; expected 0 to 1"),
    ],
)
def test_invalid_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CleanConfig(**changes)


def test_scores_come_from_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["3.5\nfirst line is a number", "second", "third", "fourth", "fifth"]
    scores = [0.9, 0.2, "0.7", None, "high"]
    records = [{"text": t, "quality": s} for t, s in zip(texts, scores, strict=True)]
    file = tmp_path / "scored.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    options = ["--path", str(file), "--rules", "none", "--near_duplicates", "none"]
    scored = ["--score_column", "quality", "--min_score", "0.5"]
    assert main(["clean", str(tmp_path / "out"), *options, *scored]) == 0
    assert _kept(tmp_path / "out") == [texts[0], "third"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    dropped = {name: found["documents"] for name, found in report["dropped"].items()}
    assert dropped == {"malformed": 2, "score": 1}
    assert report["dropped"]["score"]["examples"] == ["second"]
    assert list(load_files(file, text_field=scored_text("{text}", "quality")))[1] == "0.2\nsecond"
    capsys.readouterr()
    assert main(["clean", str(tmp_path / "b"), *options, *scored[:2]]) == 2
    (tmp_path / "a.txt").write_text("plain")
    assert main(["clean", str(tmp_path / "b"), "--path", str(tmp_path / "a.txt"), *scored]) == 2
    error = capsys.readouterr().err
    assert "got quality and None; expected both or none" in error
    assert "--score_column: got quality with text; expected records" in error
