"""pass@k: the unbiased estimate by enumeration, reproducible samples, and messages."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_tiny_run import tiny_run

from tjx_eval.main import main
from tjx_eval.scoring.pass_at_k import estimate_pass_at_k, pass_at_k

PROMPTS = ["1", "12", "2"]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_the_share_of_subsets_that_pass(k: int) -> None:
    passed = np.arange(6)
    expected = [
        np.mean(
            [any(subset) for subset in itertools.combinations([True] * c + [False] * (5 - c), k)]
        )
        for c in passed
    ]
    np.testing.assert_allclose(pass_at_k(passed, 5, k), expected, atol=1e-12)
    with pytest.raises(ValueError, match="k: got 6; expected 1 to 5"):
        pass_at_k(passed, 5, 6)


def test_the_interval_is_over_prompts() -> None:
    passed = np.array([0] * 200 + [4] * 200)
    mean, interval = estimate_pass_at_k(passed, 4, 2)
    assert mean == 0.5
    assert interval is not None
    # A binomial of 400 prompts; the 1,600 responses would make it half as wide.
    np.testing.assert_allclose((interval.low, interval.high), (0.451, 0.549), atol=0.005)
    assert estimate_pass_at_k(passed[:1], 4, 2) == (0, None)


def measure(tmp_path: Path, answers: list[str], *more: str) -> dict[str, Any]:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    rows = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, answers, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--prompts", str(file), "--json", str(out), "--max_new_tokens", "2"]
    more = ("--verifier", "exact", "--top_k", "2", *more)
    assert main(["pass_at_k", str(tiny_run()), *words, *more]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def responses(found: dict[str, Any]) -> list[list[str]]:
    return [row["responses"] for row in found["table"]]


@pytest.mark.key_reuse
def test_the_command_scores_reproducible_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--samples", "6", "--k", "4,1"]
    found = measure(tmp_path, ["7"] * 3, *few)
    answers = [row[0].strip() for row in responses(found)]
    again = measure(tmp_path, answers, *few, "--batch_size", "3")
    assert responses(again) == responses(found)  # for any batch size
    passed = [
        sum(text.strip() == answer for text in row)
        for row, answer in zip(responses(found), answers, strict=True)
    ]
    assert len(set(passed)) > 1
    assert [row["passed"] for row in again["table"]] == passed
    assert again["pass_at_1"] == pytest.approx(sum(passed) / 18)
    assert again["pass_at_4"] == pytest.approx(pass_at_k(np.array(passed), 6, 4).mean())
    assert again["pass_at_1_low_95"] <= again["pass_at_1"] <= again["pass_at_1_high_95"]
    assert "pass at 4" in capsys.readouterr().out
    fewer = measure(tmp_path, answers, "--samples", "2", "--limit", "1")
    assert responses(fewer) == [responses(found)[0][:2]]
    assert "pass_at_1_low_95" not in fewer  # one prompt has no interval
    other = measure(tmp_path, answers, "--samples", "2", "--limit", "1", "--seed", "1")
    assert responses(other) != responses(fewer)


@pytest.mark.parametrize(
    ("line", "words", "message"),
    [
        ("", [], "got no line; expected at least one with prompt and answer"),
        ('{"prompt": "1"}', [], "prompts.jsonl:1: got ['prompt']; expected an object with the str"),
        ("\udcff", [], "prompts.jsonl:1: got no JSON ('utf-8' codec"),
        ('{"prompt": "1", "answer": "2"}', ["--k", "8", "--samples", "4"], "give --samples 8"),
        ('{"prompt": "1", "answer": "2"}', ["--k", "0"], "--k: got '0'; expected a whole number"),
        ('{"prompt": "1", "answer": "2"}', [], "--max_new_tokens: got 256 after the 1 tokens of"),
        ('{"prompt": "ß", "answer": "2"}', [], "--prompts: prompt 1: text: got the characters"),
        ('{"prompt": "1", "answer": "2"}', ["--verifier", "numric"], "--verifier: "),
    ],
)
def test_mistakes_are_reported_in_one_line(
    line: str, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(line, errors="surrogateescape")
    assert main(["pass_at_k", str(tiny_run()), "--prompts", str(file), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
