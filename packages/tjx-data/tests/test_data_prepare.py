"""Prepared sets: deterministic, atomic, with correct splits."""

import hashlib
import json
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tjx_data.prepared.dataset_cache
from tjx_data import (
    DataConfig,
    Documents,
    Tokenizer,
    TokenLoader,
    char_tokenizer,
    find_problems,
    open_or_prepare,
    open_sets,
    prepare,
    read_index,
)
from tjx_data.corpora.documents import (
    Holdout,
    SplitName,
    Stage,
    assign_split,
    fraction_of_few,
)
from tjx_data.main import main

EOT = "<|endoftext|>"
CHARACTERS = char_tokenizer(["abcdefghijmnotu\né 0123456789."], special_tokens=(EOT,))
DOCUMENTS = [f"document {i}.\n" * (1 + i % 4) for i in range(60)]
SENTENCES = "the cat sat on the mat. the hat sat on the bat. a bat sat on a cat.\n" * 30


def _split(texts: list[str], holdout: Holdout, fraction: float) -> list[tuple[SplitName, str]]:
    """Split texts as `prepare` must, by an independent implementation."""
    if holdout == "documents":
        limit = fraction * 2**64
        hashes = [int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "big") for t in texts]
        return [
            ("validation" if number < limit else "train", text)
            for number, text in zip(hashes, texts, strict=True)
        ]
    found: list[tuple[SplitName, str]] = []
    border, before = int(sum(map(len, texts)) * (1 - fraction)), 0
    for text in texts:
        inside = min(max(border - before, 0), len(text))
        found += [("train", text[:inside])] if inside else []
        found += [("validation", text[inside:])] if inside < len(text) else []
        before += len(text)
    return found


def _stream(directory: Path, split: SplitName) -> list[int]:
    loader = TokenLoader(directory, split=split, seq_len=1, batch_size=1)
    return [int(i) for i in loader.read(0, loader.n_tokens)]


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@given(
    st.lists(st.text(st.sampled_from("abé \n")), min_size=12, max_size=30),
    st.integers(7, 60),
    st.sampled_from(["documents", "tail"]),
)
@settings(max_examples=40)
def test_set_has_every_document_once_between_end_of_text_tokens(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], shard_tokens: int, holdout: Holdout
) -> None:
    out = tmp_path_factory.mktemp("set") / "out"
    documents = ["a", *texts, "b" * 5, "j", "i", "h"]  # both splits get a document
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as one:
        patch.setattr("tjx_data.corpora.documents.PART_CHARACTERS", 30)
        index = prepare(
            documents, CHARACTERS, out, holdout=holdout, holdout_fraction=0.4,
            shard_tokens=shard_tokens, executor=one,
        )  # fmt: skip
    expected: dict[SplitName, list[str]] = {"train": [], "validation": []}
    for split, text in _split(documents, holdout, 0.4):
        if text.strip():
            expected[split].append(text)
    for split, kept in expected.items():
        entry = index.splits[split]
        eot = CHARACTERS.eot_id
        assert _stream(out, split) == [
            eot,
            *(i for t in kept for i in (*CHARACTERS.encode(t), eot)),
        ]
        assert entry.n_documents == len(kept)
        assert entry.n_text_bytes == sum(len(text.encode()) for text in kept)
        loader = TokenLoader(out, split=split, seq_len=1, batch_size=1)
        for i, text in enumerate(kept):
            assert CHARACTERS.decode(loader.document(i)) == text
        # Every shard but the last is full, none is empty.
        sizes = [(shard.n_bytes - 64) // 2 for shard in entry.shards]
        assert all(size == shard_tokens for size in sizes[:-1])
        assert 0 < sizes[-1] <= shard_tokens
    if holdout == "documents":
        assert index.n_empty_documents == sum(not text.strip() for text in texts)
    assert read_index(out) == index


def test_preparation_is_deterministic(tmp_path: Path) -> None:
    prepare(DOCUMENTS, CHARACTERS, tmp_path / "a", shard_tokens=100)
    prepare(iter(DOCUMENTS), CHARACTERS, tmp_path / "b", shard_tokens=100)
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    for name, content in _contents(tmp_path / "a").items():
        if name.startswith("train_0"):
            entry = next(
                e for e in read_index(tmp_path / "a").splits["train"].shards if e.name == name
            )
            assert hashlib.sha256(content).hexdigest() == entry.sha256


def test_long_documents_are_encoded_as_a_whole(tmp_path: Path) -> None:
    """Segments and batches do not change the tokens."""
    tokenizer = tjx_data.train_bpe([SENTENCES], 270)
    long = [SENTENCES * 40, SENTENCES, "a cat."] * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tjx_data.tokenization.text_splitting.BATCH_CHARACTERS", 5000)
        prepare(long, tokenizer, tmp_path / "out", holdout="tail", holdout_fraction=0.01)
    eot = tokenizer.eot_id
    kept = [text for split, text in _split(long, "tail", 0.01) if split == "train"]
    expected = [eot, *(i for text in kept for i in (*tokenizer.encode(text), eot))]
    assert _stream(tmp_path / "out", "train") == expected


def test_tail_holdout_is_nanogpts_split_by_characters(tmp_path: Path) -> None:
    text = "".join("abcdefghij"[i % 10] for i in range(1003)) + "é" * 2
    tokenizer = char_tokenizer([text])
    prepare([text], tokenizer, tmp_path / "out", holdout="tail", holdout_fraction=0.1)
    border = int(1005 * 0.9)
    assert _stream(tmp_path / "out", "train") == tokenizer.encode(text[:border])
    assert _stream(tmp_path / "out", "validation") == tokenizer.encode(text[border:])


def test_split_of_a_document_is_independent_of_its_position() -> None:
    sides = dict(zip(DOCUMENTS, (s for s, _ in _split(DOCUMENTS, "documents", 0.3))))  # noqa: B905  equal by construction
    backwards = {text: side for side, text in _split(DOCUMENTS[::-1], "documents", 0.3)}
    assert sides == backwards
    many = [f"text {i}" for i in range(4000)]
    held_out = sum(side == "validation" for side, _ in _split(many, "documents", 0.1))
    assert 0.08 < held_out / 4000 < 0.12


def test_wide_vocabularies_are_stored_in_uint32(tmp_path: Path) -> None:
    wide = char_tokenizer([chr(i) for i in range(0xE000, 0xE000 + 6000)] + _cjk(66000))
    assert wide.vocab_size > 1 << 16
    last = _cjk(66000)[-1]
    index = prepare([last * 50], wide, tmp_path / "out", holdout="tail")
    assert index.dtype == "uint32"
    assert _stream(tmp_path / "out", "train") == wide.encode(last * 45)


def _cjk(n: int) -> list[str]:
    return [chr(0x20000 + i) for i in range(n)]


def test_documents_that_cannot_be_split_are_rejected_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"single document; expected 'tail'"):
        prepare(["abc"], CHARACTERS, tmp_path / "out")
    with pytest.raises(ValueError, match="no document with text"):
        prepare(["", " \n"], CHARACTERS, tmp_path / "out")
    with pytest.raises(ValueError, match="none of the 2 documents for validation"):
        prepare(["abc", "def"], CHARACTERS, tmp_path / "out", holdout_fraction=1e-9)
    with pytest.raises(ValueError, match="no text for training"):
        prepare(["ab"], CHARACTERS, tmp_path / "out", holdout="tail", holdout_fraction=0.9)
    with pytest.raises(ValueError, match="reads the documents twice"):
        prepare(iter(["abc"]), CHARACTERS, tmp_path / "out", holdout="tail")
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    prepare(DOCUMENTS, CHARACTERS, tmp_path / "out")
    with pytest.raises(ValueError, match="not an empty folder"):
        prepare(DOCUMENTS, CHARACTERS, tmp_path / "out")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(SENTENCES + EOT.join(SENTENCES[i : i + 90] for i in range(0, 2000, 45)))
    return file


def test_cached_set_is_reused_until_a_setting_changes(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    config = DataConfig(path=str(text_file), vocab_size=265)
    stages = set()
    first = open_or_prepare(config, cache, progress=lambda stage: stages.add(stage.name))
    assert stages == {"train tokenizer", "write shards"}
    with monkeypatch.context() as patch:
        patch.setattr(
            tjx_data.prepared.dataset_cache, "prepare", lambda *_, **__: pytest.fail("made again")
        )
        assert open_or_prepare(config, cache) == first
        moved = text_file.rename(tmp_path / "moved.txt")
        assert open_or_prepare(DataConfig(path=str(moved), vocab_size=265), cache) == first
    folders = {first}
    config = DataConfig(path=str(moved), vocab_size=265)
    for other in (
        replace(config, vocab_size=266),
        replace(config, tokenizer="char"),
        replace(config, holdout_fraction=0.2),
        replace(config, tokenizer=str(first), holdout="tail"),
    ):
        folders.add(open_or_prepare(other, cache))
    moved.write_text(moved.read_text() + "more")
    folders.add(open_or_prepare(DataConfig(path=str(moved), vocab_size=265), cache))
    assert len(folders) == 6


def test_tokenizer_is_trained_without_held_out_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    train_bpe = tjx_data.train_bpe

    def spy(texts: Iterable[str], vocab_size: int, **choices: Any) -> Tokenizer:
        seen.extend(texts)
        return train_bpe(seen, vocab_size, **choices)

    documents = Documents.of(lambda: DOCUMENTS, {})
    monkeypatch.setattr("tjx_data.prepared.dataset_cache.load_corpus", lambda _, **__: documents)
    monkeypatch.setattr("tjx_data.prepared.dataset_cache.train_bpe", spy)
    open_or_prepare(DataConfig(vocab_size=260), tmp_path)
    expected = [text for side, text in _split(DOCUMENTS, "documents", 0.1) if side == "train"]
    assert seen == expected


def test_one_of_a_few_files_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for text in map("sheep {} of a few".format, range(60))
             if assign_split(text, 0.1) == "train"][:26]  # fmt: skip
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    seen: list[str] = []
    train_bpe = tjx_data.train_bpe

    def spy(texts: Iterable[str], vocab_size: int, **choices: Any) -> Tokenizer:
        seen.extend(texts)
        return train_bpe(seen, vocab_size, **choices)

    monkeypatch.setattr("tjx_data.prepared.dataset_cache.train_bpe", spy)
    config = DataConfig(path=f"{tmp_path}/*.txt", vocab_size=260)
    folder = open_or_prepare(config, tmp_path / "cache")
    counts = read_index(folder).splits
    assert (counts["train"].n_documents, counts["validation"].n_documents) == (25, 1)
    loader = TokenLoader(folder, split="validation", seq_len=4, batch_size=1)
    held_out = Tokenizer.load(folder).decode(loader.document(0))
    assert sorted([*seen, held_out]) == sorted(texts)
    assert fraction_of_few(texts * 12, 0.1) == 0.1
    assert fraction_of_few(texts[:9], 0.1) == 0.1  # less than one document


@pytest.mark.parametrize(
    ("sides", "holdout"),
    [(["train"], "tail"), (["train"] * 9, "tail"), (["train"] * 2 + ["validation"], "documents")],
)
def test_the_end_of_a_few_files_is_held_out_if_no_whole_document_is(
    sides: list[str], holdout: str, tmp_path: Path
) -> None:
    text = "".join(f"sheep {n} of many\n" for n in range(50))
    candidates = [f"{number} {text}" for number in range(100)]
    for number, side in enumerate(sides):
        found = next(one for one in candidates if assign_split(one, 0.1) == side)
        candidates.remove(found)
        (tmp_path / f"{number}.txt").write_text(found)
    config = DataConfig(path=f"{tmp_path}/*.txt", tokenizer="byte")
    index = read_index(open_or_prepare(config, tmp_path / "cache"))
    assert index.holdout == holdout
    if holdout == "tail":
        counts = {name: split.n_tokens for name, split in index.splits.items()}
        assert counts["validation"] == pytest.approx(sum(counts.values()) / 10, rel=0.05)
        by_document = replace(config, holdout="documents")
        with pytest.raises(ValueError, match=r"choose 'tail'|expected 'tail'"):
            open_or_prepare(by_document, tmp_path / "cache")


def test_of_two_concurrent_calls_one_prepares_and_one_waits(
    text_file: Path, tmp_path: Path
) -> None:
    config = DataConfig(path=str(text_file), vocab_size=265)
    begun = threading.Event()
    reports: list[str] = []

    def slow(_: Stage) -> None:
        reports.append("first")
        if not begun.is_set():
            begun.set()
            time.sleep(0.5)  # the second call starts meanwhile

    with ThreadPoolExecutor() as pool:
        first = pool.submit(open_or_prepare, config, tmp_path / "c", progress=slow)
        assert begun.wait(30)
        second = pool.submit(
            open_or_prepare, config, tmp_path / "c", progress=lambda *_: reports.append("second")
        )
        assert first.result() == second.result()
    assert set(reports) == {"first"}
    TokenLoader(first.result(), seq_len=8, batch_size=2).verify()


def test_all_config_problems_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="corpus") as error:
        DataConfig(corpus="pyton-docs", seq_len=0, vocab_size=3, holdout_fraction=2.0)
    assert len(str(error.value).splitlines()) == 4
    assert "did you mean python-docs" in str(error.value)
    config = DataConfig(path=str(tmp_path / "none.txt"), tokenizer="none.json")
    problems = find_problems(config)
    assert [problem.path for problem in problems] == ["path", "tokenizer"]
    assert "none.txt" in problems[0].message
    assert "none.json" in problems[1].message
    assert find_problems(DataConfig()) == []


def test_auto_tokenizer_depends_on_the_corpus() -> None:
    assert DataConfig(tokenizer="auto").tokenizer_kind == "bpe"
    assert DataConfig(tokenizer="auto", corpus="wikitext-103").tokenizer_kind == "gpt2"
    own = DataConfig(tokenizer="auto", corpus="wikitext-103", path="mine.txt")
    assert own.tokenizer_kind == "bpe"


def test_command_prepares_and_inspects(
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tjx_data.main._DASK_TIMEOUT", 0.5)
    options = ["--path", str(text_file), "--vocab_size", "265", "--cache_dir", str(tmp_path / "c")]
    assert main(["prepare", *options]) == 0
    directory = capsys.readouterr().out.splitlines()[0]
    picture = tmp_path / "lengths.png"
    assert main(["inspect", directory, "--verify", "--picture", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert "265 tokens, uint16" in shown
    assert "all hashes match the index" in shown
    assert "up to " in shown
    assert "the cat sat on the mat" in shown
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no prepared data here" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "\x1b[31m")]) == 2
    assert "\x1b" not in capsys.readouterr().err
    assert main(["prepare", "--corpus", "wikitext"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["prepare", *options, "--dask", "tcp://127.0.0.1:9"]) == 2
    assert "no scheduler answers" in capsys.readouterr().err


def test_index_is_plain_json_without_times(tmp_path: Path) -> None:
    documents = Documents.of(lambda: DOCUMENTS, {"corpus": "mine"})
    prepare(documents, CHARACTERS, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "index.json").read_text())
    assert content["source"] == {"corpus": "mine"}
    starts = np.fromfile(tmp_path / "out" / "train_starts.bin", "<u8")
    assert len(starts) == content["splits"]["train"]["n_documents"]
    assert starts[0] == 1


def test_malformed_records_are_listed_or_fatal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.jsonl"
    lines = [json.dumps({"body": f"document {i} of a few words"}) for i in range(50)]
    lines[7], lines[30] = "{broken", json.dumps({"body": 3})
    file.write_text("\n".join(lines) + "\n")
    config = DataConfig(path=str(file), text_field="body", tokenizer="char")
    directory = open_or_prepare(config, tmp_path / "cache")
    index = read_index(directory)
    assert index.n_malformed == 2
    listed = [json.loads(line) for line in (directory / "malformed.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in listed] == [(str(file), 8), (str(file), 31)]
    assert sum(split.n_documents for split in index.splits.values()) == 48
    assert main(["inspect", str(directory)]) == 0
    assert "malformed records left out: 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"text\.jsonl, line 8"):
        open_or_prepare(replace(config, strict=True, holdout_fraction=0.2), tmp_path / "cache")
    file.write_text("nothing\nhere\n")
    with pytest.raises(ValueError, match="holds no JSON lines with text: line 1"):
        open_or_prepare(config, tmp_path / "cache")


def test_mixture_shares_one_tokenizer(text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(EOT.join(f"zebra {i} quagga" for i in range(3000)))
    mixture = f"{text_file}=3,{other}=1"
    sets = open_sets(DataConfig(mixture=mixture, vocab_size=275), tmp_path / "cache")
    assert list(sets) == [str(text_file), str(other)]
    one, two = map(Tokenizer.load, sets.values())
    assert one.fingerprint == two.fingerprint
    assert one.decode(one.encode("zebra")) == "zebra"
    assert len(one.encode("zebra zebra")) < len("zebra zebra")  # it was trained on both
    assert open_sets(DataConfig(mixture=mixture, vocab_size=275), tmp_path / "cache") == sets
    with pytest.raises(ValueError, match=r"expected None .* use tjx_data\.open_sets"):
        open_or_prepare(DataConfig(mixture=mixture), tmp_path / "cache")
    with pytest.raises(ValueError, match="expected NAME=WEIGHT") as error:
        DataConfig(mixture="python-docs,a.txt=x,b.txt=-1,c.txt=1,c.txt=2,pyton-docs=1")
    assert len(str(error.value).splitlines()) == 5


def test_packing_is_computed_with_the_set(text_file: Path, tmp_path: Path) -> None:
    config = DataConfig(path=str(text_file), tokenizer="byte", packing="documents", seq_len=32)
    directory = open_or_prepare(config, tmp_path / "cache")
    names = {path.name for path in directory.glob("packing_*")}
    assert names == {"packing_train_32.npz", "packing_validation_32.npz"}
