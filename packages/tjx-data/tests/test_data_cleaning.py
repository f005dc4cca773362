"""Cleaning: planted duplicates and evaluation texts, quality rules, resuming, executors."""

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest

from tjx_data import Documents, clean
from tjx_data.cleaning import clean_parts
from tjx_data.cleaning.clean_config import CleanConfig
from tjx_data.cleaning.contamination import index_evaluation_texts, is_contaminated
from tjx_data.cleaning.rules import MASKS, RULES, Measures, find_rules
from tjx_data.cleaning.words import ngram_hashes, normalized_words, word_hashes
from tjx_data.corpora.documents import InMemoryPart, Malformed
from tjx_data.main import main
from tjx_data.prepared.executors import SerialExecutor, run_in_order

pytest.importorskip("datasketch", reason="the extra near-duplicates is not installed")

NO_RULES = CleanConfig(rules=(), masks=())
RNG = random.Random(0)  # noqa: S311  # test data
NAMES = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "lo")]
GOOD = (
    "The old house at the end of the road had been empty for years, and nobody knew who owned it. "
    "Children told stories of a man that lived there with a dog. In summer the garden was full of "
    "roses, to the delight of the whole street. One day a letter came, and the door stood open."
)


def _document(n_words: int = 120) -> str:
    return " ".join(RNG.choices(NAMES, k=n_words))


def _edited(text: str, fraction: float) -> str:
    """Substitute, delete or insert a fraction of the words."""
    words = text.split(" ")
    for _ in range(max(1, round(fraction * len(words)))):
        i, kind = RNG.randrange(len(words)), RNG.randrange(3)
        words[i : i + (kind != 0)] = [] if kind == 1 else [RNG.choice(NAMES)]
    return " ".join(words)


def _kept(folder: Path) -> list[str]:
    lines = (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def _corpus(n_parts: int = 4) -> Documents:
    random_state = RNG.getstate()
    RNG.seed(1)
    parts = []
    for _ in range(n_parts):
        texts = [_document() for _ in range(20)]
        texts += [_edited(texts[3], 0.1), texts[5], "", f"{texts[0]} mail me@example.org."]
        parts.append(InMemoryPart((*texts, Malformed("a.jsonl", 3, "no text"))))
    RNG.setstate(random_state)
    return Documents({"corpus": "test"}, lambda: parts)


@pytest.mark.parametrize("fraction", [0.05, 0.2])
def test_planted_near_duplicates_are_found_and_others_kept(tmp_path: Path, fraction: float) -> None:
    originals = [_document() for _ in range(300)]
    planted = [_edited(text, fraction) for text in originals[:100]]
    texts = originals + planted
    RNG.shuffle(texts)
    report = clean(texts, tmp_path / "out", NO_RULES)
    assert 98 <= report["dropped"]["near-duplicate"]["documents"] <= 100
    kept = set(_kept(tmp_path / "out"))
    assert kept >= set(originals[100:])
    pairs = zip(originals, planted, strict=False)
    assert sum((a in kept) + (b in kept) == 1 for a, b in pairs) >= 98
    # The first of each pair is kept.
    places = {text: i for i, text in enumerate(texts)}
    for a, b in zip(originals, planted, strict=False):
        assert min(a, b, key=places.__getitem__) in kept


def test_exact_duplicates_keep_the_first(tmp_path: Path) -> None:
    texts = [_document(), _document()]
    config = CleanConfig(rules=(), near_duplicates=None)
    report = clean([texts[0], texts[1], texts[0], texts[0] + "!"], tmp_path / "out", config)
    assert report["dropped"]["exact-duplicate"]["documents"] == 1
    assert _kept(tmp_path / "out") == [texts[0], texts[1], texts[0] + "!"]


def test_planted_evaluation_texts_are_removed(tmp_path: Path) -> None:
    evaluation = [_document(60), _document(13), _document(7), "yes no"]
    evaluation.append("Who didn't, in the U.S., see it's no war?")
    documents = [_document() for _ in range(40)]
    upper = [evaluation[0].upper().replace(" ", ", "), evaluation[1], f"({evaluation[2]})"]
    upper.append("who didnt in the US see its no war")
    planted = [f"{_document(30)} {text}\n{_document(30)}" for text in upper]
    report = clean([*planted, *documents], tmp_path / "out", NO_RULES, evaluation=evaluation)
    assert report["dropped"]["contaminated"]["documents"] == 4
    assert report["short_evaluation_texts"] == 1
    assert _kept(tmp_path / "out") == documents
    index, _ = index_evaluation_texts([evaluation[0]])
    twelve, thirteen = (" ".join(evaluation[0].split()[5 : 5 + n]) for n in (12, 13))
    assert not is_contaminated(twelve, index)
    assert is_contaminated(thirteen, index)


def test_ngrams_depend_on_the_order_of_words_only() -> None:
    words = word_hashes(normalized_words("one two three. ONE two! Three, one"))
    pairs = ngram_hashes(words, 3)
    assert len(pairs) == 5
    assert pairs[0] == pairs[3]
    assert len(np.unique(pairs)) == 3
    assert len(ngram_hashes(words, 8)) == 0


BAD = {
    "gopher-words": "Too short, and it is the end of that.",
    "gopher-word-length": "the and of to " + "incomprehensibilities " * 60,
    "gopher-symbols": GOOD + " #a" * 20,
    "gopher-bullets": "\n".join(f"- {part}." for part in GOOD.split(". ")),
    "gopher-ellipses": "\n".join(f"{part} ..." for part in GOOD.split(". ")),
    "gopher-letters": GOOD + " 12" * 40,
    "gopher-stop-words": " ".join(w for w in GOOD.split() if len(w) > 4) * 3,
    "gopher-lines": f"{GOOD}\n" + "same.\n" * 3,
    "gopher-2-grams": GOOD + " so far" * 30,
    "gopher-3-grams": "So very far. " * 16 + GOOD,
    "gopher-4-grams": "Why so very far. " * 9 + GOOD,
    "c4-lorem-ipsum": GOOD + " Lorem ipsum.",
    "c4-curly-bracket": GOOD + " {",
    "c4-sentences": GOOD.replace(".", ""),
    "fineweb-punctuation": GOOD.replace(". ", " ").replace(".", ""),
    "fineweb-duplicates": f"{GOOD}\n{GOOD}\nend.",
    "fineweb-short-lines": GOOD.replace(" ", "\n"),
}


def test_every_rule_drops_its_example_and_keeps_good_text() -> None:
    assert BAD.keys() == {rule.name for rule in RULES}
    for rule in RULES:
        assert rule.keeps(Measures(GOOD)), rule.name
        assert not rule.keeps(Measures(BAD[rule.name])), rule.name
        assert not rule.keeps(Measures("")) or rule.minimum == 0


def test_rules_are_chosen_by_name_or_group() -> None:
    assert [rule.name for rule in find_rules(("c4-sentences", "gopher-lines"))] == [
        "gopher-lines",
        "c4-sentences",
    ]
    assert {rule.name[:3] for rule in find_rules(("c4",))} == {"c4-"}
    with pytest.raises(ValueError, match=r"rules: got 'gofer'; expected some of .*mean gopher"):
        CleanConfig(rules=("gofer",))
    with pytest.raises(ValueError, match="near_duplicates: got 2; expected above 0"):
        CleanConfig(near_duplicates=2)


def test_masks_replace_personal_data_only() -> None:
    text = "a.b@c-d.co.uk, 10.1.2.255; 1.2.3.4.5 and 999.1.1.1, v1.2.3; call +1 (555) 123-4567 @ 5"
    masked = text
    for mask in MASKS:
        masked = mask.pattern.sub(mask.replacement, masked)
    assert masked == "<email>, <ip>; 1.2.3.4.5 and 999.1.1.1, v1.2.3; call <phone> @ 5"


class _StoppedError(Exception):
    """Simulates a kill."""


class _Stopping(SerialExecutor):
    """Executor that stops after some calls."""

    def __init__(self, n_calls: int):
        self.n_calls = n_calls

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        if not self.n_calls:
            raise _StoppedError
        self.n_calls -= 1
        return super().submit(fn, *args, **kwargs)


def test_stopped_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    report = clean(_corpus(), tmp_path / "whole", executor=SerialExecutor())
    assert report["read"]["documents"] == 4 * 25
    assert report["dropped"]["malformed"]["examples"][0] == "a.jsonl, line 3: no text"
    with pytest.raises(_StoppedError):
        clean(_corpus(), tmp_path / "out", executor=_Stopping(2), in_flight=1)
    assert not (tmp_path / "out").exists()
    clean(_corpus(), tmp_path / "out", executor=_Stopping(2))  # the other two parts
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*.work"))
    with pytest.raises(ValueError, match=r"out_dir: got .*not an empty folder"):
        clean(_corpus(), tmp_path / "out")
    # Other settings do not reuse finished parts.
    with pytest.raises(_StoppedError):
        clean(_corpus(), tmp_path / "next", executor=_Stopping(3))
    with pytest.raises(_StoppedError):
        clean(_corpus(), tmp_path / "next", NO_RULES, executor=_Stopping(3))


def test_dask_gives_the_bytes_of_processes(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    config = CleanConfig(rules=(), masks=(), repeated_spans=64)
    clean(_corpus(), tmp_path / "processes", config)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        clean(_corpus(), tmp_path / "dask", config, executor=client.get_executor())
    assert _contents(tmp_path / "dask") == _contents(tmp_path / "processes")
    report = json.loads((tmp_path / "dask" / "report.json").read_text())
    dropped = {name: found["documents"] for name, found in report["dropped"].items()}
    assert dropped == {"malformed": 4, "empty": 4, "exact-duplicate": 4, "near-duplicate": 8}


def test_calls_are_bounded_and_results_in_order() -> None:
    submitted: list[int] = []

    def tasks() -> Iterator[tuple[int, int | None]]:
        for i in range(5):
            submitted.append(i)
            yield i, -1 if i == 2 else None

    executor: Executor = SerialExecutor()
    results = run_in_order(executor, lambda i: i * i, tasks(), 2)
    assert next(results) == 0
    assert submitted == [0, 1]
    assert list(results) == [1, -1, 9, 16]


def test_command_cleans_files_and_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "<script> {"
    (tmp_path / "a.txt").write_text(f"{GOOD}<|endoftext|>{bad}<|endoftext|>{GOOD} By me@x.org.")
    (tmp_path / "exam.txt").write_text("nothing of it occurs in these documents")
    options = ["--path", str(tmp_path / "a.txt"), "--evaluation", str(tmp_path / "exam.txt")]
    out = tmp_path / "out"
    assert main(["clean", str(out), *options, "--near_duplicates", "none"]) == 0
    assert "gopher-words                       1" in capsys.readouterr().out
    assert _kept(out) == [GOOD, f"{GOOD} By <email>."]
    page = (out / "report.html").read_text()
    assert "&lt;script&gt; {" in page
    assert "<script" not in page
    assert "email 1" in page
    assert main(["clean", str(tmp_path / "b"), *options, "--near_duplicates", "some"]) == 2
    assert main(["clean", str(tmp_path / "b")]) == 2
    assert "expected one of them" in capsys.readouterr().err


def test_documents_without_utf8_are_malformed(tmp_path: Path) -> None:
    report = clean([GOOD, f"{GOOD}\ud800"], tmp_path / "out")
    assert report["dropped"]["malformed"]["documents"] == 1
    assert _kept(tmp_path / "out") == [GOOD]


def test_damaged_part_files_are_cleaned_again(tmp_path: Path) -> None:
    (tmp_path / "part.npz").write_bytes(b"no archive")
    assert clean_parts.read_clean_record(tmp_path / "part.npz") is None
    assert clean_parts.read_clean_record(tmp_path / "missing.npz") is None
