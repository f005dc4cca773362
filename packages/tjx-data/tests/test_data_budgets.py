"""Budgets of documents and tokens, and nested subsets."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from words import TOKENIZER

from tjx_data import DataConfig, Documents, TokenLoader, open_sets, prepare, read_index
from tjx_data.corpora import documents as documents_module
from tjx_data.corpora.document_limits import limit_documents
from tjx_data.corpora.documents import Holdout, InMemoryPart, Malformed, SplitName, assign_split

TEXTS = [f"{'abcdefghij'[n % 10]}{'bcd' * (n % 7)} {bin(n)}".replace("0", "a").replace("1", "j")
         for n in range(400)]  # fmt: skip


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "PART_CHARACTERS", 200)


def corpus(texts: list[str] = TEXTS) -> Documents:
    return Documents.of(lambda: texts, {"corpus": "texts"}, sum(map(len, texts)))


def stream(directory: Path, split: SplitName = "train") -> list[int]:
    loader = TokenLoader(directory, split=split, seq_len=1, batch_size=1)
    return [int(token) for token in loader.read(0, loader.n_tokens)]


def test_subsets_are_nested_and_independent_of_the_holdout() -> None:
    kept = {f: set(limit_documents(corpus(), subset=f)) for f in (0.05, 0.3, 0.6, 1.0)}
    assert kept[0.05] < kept[0.3] < kept[0.6] < kept[1.0] == set(TEXTS)
    assert len(kept[0.3]) == pytest.approx(120, abs=35)
    held_out = [text for text in kept[0.3] if assign_split(text, 0.3) == "validation"]
    assert len(held_out) == pytest.approx(0.3 * len(kept[0.3]), abs=20)


def test_subset_does_not_depend_on_order() -> None:
    shuffled = TEXTS[::-1]
    assert set(limit_documents(corpus(shuffled), subset=0.4)) == set(
        limit_documents(corpus(), subset=0.4)
    )


@pytest.mark.parametrize("count", [1, 7, 8, 399, 400, 999])
def test_first_documents_are_counted_without_empty_and_malformed_ones(count: int) -> None:
    mixed = [item for text in TEXTS for item in (text, " \n", Malformed("f", 1, "bad"))]
    limited = limit_documents(Documents.of(lambda: mixed, {"corpus": "mixed"}), max_documents=count)
    found = [text for text in limited if text.strip()]
    assert found == TEXTS[:count]
    assert limited.source["max_documents"] == str(count)
    assert len({part.identity for part in limited.parts()}) == len(list(limited.parts()))


@pytest.mark.parametrize("holdout", ["documents", "tail", "official"])
@pytest.mark.parametrize("max_tokens", [3, 57, 58, 1000, 10**6])
def test_training_split_is_the_start_of_the_unlimited_one(
    tmp_path: Path, holdout: Holdout, max_tokens: int
) -> None:
    def build(name: str, limit: int | None, workers: int) -> Path:
        held_out = [InMemoryPart(("jjj", "iii")), InMemoryPart(("hhh",))]
        whole = corpus()
        given = Documents(whole.source, whole.parts, whole.n_bytes, lambda: held_out)
        with ThreadPoolExecutor(workers) as pool:
            prepare(given, TOKENIZER, tmp_path / name, holdout=holdout, holdout_fraction=0.3,
                    max_tokens=limit, executor=pool, in_flight=2 * workers)  # fmt: skip
        return tmp_path / name

    whole, limited = build("whole", None, 1), build("limited", max_tokens, 1)
    full, found = stream(whole), stream(limited)
    # A document is not cut to its end-of-text token alone.
    assert 0 <= min(max_tokens, len(full)) - len(found) <= 1
    eot = TOKENIZER.eot_id
    assert found[:-1] == full[: len(found) - 1]
    assert found[-1] == eot
    ids = np.array(found)
    n_bytes = int(TOKENIZER.token_byte_lengths[ids].sum())
    assert read_index(limited).splits["train"].n_text_bytes == n_bytes
    assert read_index(limited).splits["train"].n_documents == found.count(eot) - 1
    held_out_all, held_out = stream(whole, "validation"), stream(limited, "validation")
    assert held_out == held_out_all[: len(held_out)]
    if holdout != "documents" or max_tokens >= len(full):
        assert held_out == held_out_all
    else:
        assert len(held_out) < len(held_out_all)
    # The order in which workers finish does not change the files.
    other = build("other", max_tokens, 3)
    for file in sorted(limited.iterdir()):
        assert file.read_bytes() == (other / file.name).read_bytes()


def test_corpus_is_not_read_far_beyond_the_budget(tmp_path: Path) -> None:
    n_read = 0

    def endless() -> Iterator[InMemoryPart]:
        nonlocal n_read
        while True:
            n_read += 1
            yield InMemoryPart((TEXTS[n_read % 400] + "j" * (n_read % 50),))

    given = Documents({"corpus": "endless"}, endless)
    with ThreadPoolExecutor(1) as one:
        prepare(given, TOKENIZER, tmp_path / "set", max_tokens=2000, executor=one, in_flight=2)
    assert len(stream(tmp_path / "set")) == 2000
    assert n_read < 200


def test_limits_belong_to_the_prepared_set(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("<|endoftext|>".join(TEXTS))

    def folder(**limits: object) -> Path:
        config = DataConfig(path=str(file), tokenizer="byte", cache_dir=str(tmp_path), **limits)  # type: ignore[arg-type]
        return next(iter(open_sets(config).values()))

    folders = [
        folder(), folder(max_tokens=500), folder(max_documents=50), folder(subset=0.5),
        folder(subset=0.5, max_documents=50),
    ]  # fmt: skip
    assert len(set(folders)) == 5
    sizes = [sum(s.n_documents for s in read_index(f).splits.values()) for f in folders]
    assert sizes[0] == 400
    assert sizes[2] == sizes[4] == 50
    assert folder(max_tokens=500) == folders[1]
    assert len(stream(folders[1])) == 500
    assert read_index(folders[4]).source["subset"] == "0.5"


def test_bpe_does_not_read_the_corpus_beyond_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def record(texts: Iterable[str], vocab_size: int, **_: object) -> object:
        assert vocab_size
        seen.extend(texts)
        return TOKENIZER

    monkeypatch.setattr("tjx_data.prepared.dataset_cache.train_bpe", record)
    file = tmp_path / "text.txt"
    file.write_text("<|endoftext|>".join(TEXTS))
    config = DataConfig(path=str(file), cache_dir=str(tmp_path), max_tokens=100)
    open_sets(config)
    assert sum(map(len, seen)) == 800


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_tokens": 2}, "max_tokens: got 2; expected at least 3"),
        ({"max_documents": 0}, "max_documents: got 0; expected at least 1"),
        ({"subset": 0.0}, r"subset: got 0\.0; expected above 0"),
        ({"subset": 1.5}, r"subset: got 1\.5; expected above 0"),
    ],
)
def test_invalid_limits_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**limits)  # type: ignore[arg-type]
    calls: list[Callable[[], object]] = [lambda: limit_documents(corpus(), **limits)]  # type: ignore[arg-type]
    if "max_tokens" in limits:
        calls = [lambda: prepare(TEXTS, TOKENIZER, "out", max_tokens=2)]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
