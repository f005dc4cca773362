"""The evaluation app on a run that the trainer made: figures, text, and what it refuses."""

import json
import math
import shutil
from pathlib import Path

import pytest
from eval_tiny_run import tiny_run

from tjx_eval.main import main


@pytest.fixture(scope="module")
def run_dir() -> Path:
    return tiny_run()


def figures(run_dir: Path, out: Path, *more: str) -> dict[str, float]:
    assert main(["loss", str(run_dir), "--json", str(out), *more]) == 0
    found: dict[str, float] = json.loads(out.read_text())
    return found


def test_loss_is_what_training_logged_for_any_batch_size(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures(run_dir, tmp_path / "a.json")
    assert "bits per byte" in capsys.readouterr().out
    # What is evaluated is the mean of the parameters, here as there.
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    logged = [record for record in records if "eval/loss" in record][-1]
    for name in ("loss", "perplexity", "bits_per_byte", "bits_per_token"):
        assert found[name] == pytest.approx(logged[f"eval/{name}"], rel=1e-5)
    other = figures(run_dir, tmp_path / "b.json", "--batch_size", "8")
    for name in ("loss", "top1_accuracy", "top5_accuracy", "top10_accuracy", "tokens"):
        assert other[name] == pytest.approx(found[name], rel=1e-6)
    # An accuracy is a share of whole tokens, and more guesses are right more often.
    hits = found["top1_accuracy"] * found["tokens"]
    assert hits == pytest.approx(round(hits), abs=1e-6)
    assert found["top1_accuracy"] <= found["top5_accuracy"] <= found["top10_accuracy"] <= 1
    assert found["loss"] == pytest.approx(math.log(found["perplexity"]))


def test_max_tokens_stops_there(run_dir: Path, tmp_path: Path) -> None:
    assert figures(run_dir, tmp_path / "c.json", "--max_tokens", "100")["tokens"] == 100


def test_data_is_prepared_again_where_the_cache_was_emptied(run_dir: Path, tmp_path: Path) -> None:
    before = figures(run_dir, tmp_path / "d.json")
    (folder,) = json.loads((run_dir / "data.json").read_text())["folders"].values()
    shutil.rmtree(folder)
    assert figures(run_dir, tmp_path / "e.json")["loss"] == pytest.approx(before["loss"])


def test_generate_continues_and_repeats_for_a_seed(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        words = ["--prompt", "12 ", "--max_new_tokens", "10", "--temperature", "1", "--seed", seed]
        assert main(["generate", str(run_dir), *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("12 ")
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["loss", "{tmp}/nothing"], "there is no such folder"),
        (["loss", "{tmp}"], "this is a folder of runs: give one of them"),
        (["loss", "{tmp}/new"], "there is no checkpoint yet"),
        (["generate", "{run}", "--max_new_tokens", "99"], "longest sequence is 16"),
        (["loss", "{run}", "--batch_size", "12"], "multiple of the 8 devices: give 16"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(
    words: list[str],
    complaint: str,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "new").mkdir()
    shutil.copy(run_dir / "config.yaml", tmp_path / "new")
    assert main([word.format(tmp=tmp_path, run=run_dir) for word in words]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert len(error.splitlines()) == 1


def test_everything_wrong_with_a_command_line_is_told_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["generate", "somewhere", "--top_k", "0", "--samples", "x", "--pormpt", "a"]) == 2
    told = capsys.readouterr().err
    assert "--top_k: '0' is not a whole number of at least 1" in told
    assert "--samples: 'x' is not" in told
    assert "--pormpt: there is no such flag; did you mean --prompt?" in told
    assert main(["los", "somewhere"]) == 2
    assert "los: there is no such command; did you mean loss?" in capsys.readouterr().err
