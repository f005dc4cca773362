"""Command line of the app: loading of models, and error messages."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from eval_tiny_run import as_transformers, tiny_run

import tjx_data
import tjx_eval
from tjx_data import byte_tokenizer
from tjx_eval.commands.tables import print_rows
from tjx_eval.load_model import load_model
from tjx_eval.main import main
from tjx_eval.scoring.eval_data import load_texts
from tjx_eval.scoring.score import Metric


@pytest.fixture(scope="module")
def run_dir() -> Path:
    return tiny_run()


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_transformers(tiny_run(), tmp_path_factory.mktemp("hf") / "model")


def figures(model: Path, out: Path, *more: str) -> dict[str, float]:
    assert main(["loss", str(model), "--json", str(out), *more]) == 0
    found: dict[str, float] = json.loads(out.read_text())
    return found


def test_loss_is_what_training_logged_for_any_batch_size(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures(run_dir, tmp_path / "a.json")
    assert "bits per byte" in capsys.readouterr().out
    # Both evaluate the average of the parameters.
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    logged = {record["step"]: record for record in records if "eval/loss" in record}
    assert found["step"] == 4
    for name in ("loss", "perplexity", "bits_per_byte", "bits_per_token"):
        assert found[name] == pytest.approx(logged[4][f"eval/{name}"], rel=1e-5)
    other = figures(run_dir, tmp_path / "b.json", "--batch_size", "3")
    for name in ("loss", "top1_accuracy", "top5_accuracy", "top10_accuracy", "tokens"):
        assert other[name] == pytest.approx(found[name], rel=1e-6)
    # Accuracies are fractions of whole tokens, and increase with k.
    hits = found["top1_accuracy"] * found["tokens"]
    assert hits == pytest.approx(round(hits), abs=1e-6)
    assert found["top1_accuracy"] <= found["top5_accuracy"] <= found["top10_accuracy"] <= 1
    assert found["loss"] == pytest.approx(math.log(found["perplexity"]))
    earlier = figures(run_dir, tmp_path / "c.json", "--step", "2")
    assert earlier["step"] == 2
    assert earlier["loss"] == pytest.approx(logged[2]["eval/loss"], rel=1e-5)
    assert figures(run_dir, tmp_path / "d.json", "--max_tokens", "100")["tokens"] == 100


def test_data_is_prepared_again_after_the_cache_is_deleted(run_dir: Path, tmp_path: Path) -> None:
    before = figures(run_dir, tmp_path / "d.json")
    (folder,) = json.loads((run_dir / "data.json").read_text())["folders"].values()
    shutil.rmtree(folder)
    assert figures(run_dir, tmp_path / "e.json")["loss"] == pytest.approx(before["loss"])


def test_a_transformers_model_has_the_loss_of_the_run(
    run_dir: Path, transformers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("12 sheep and more more\n")
    words = ["--data", str(text), "--window", "16"]
    run, folder = (figures(model, tmp_path / "f.json", *words) for model in (run_dir, transformers))
    assert folder["loss"] == pytest.approx(run["loss"], rel=1e-6)
    assert folder["text_bytes"] == run["text_bytes"]
    capsys.readouterr()
    assert main(["loss", str(transformers)]) == 2
    assert "has no validation data; give --data" in capsys.readouterr().err


def test_all_command_line_errors_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--window", "0", "--batch_size", "x", "--staide", "3"]
    assert main(["loss", str(tmp_path / "gone"), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].endswith("gone: no such directory")
    assert "--window: got '0'; expected a whole number of at least 1" in lines[1]
    assert "--batch_size: got 'x'; expected a whole number" in lines[2]
    assert "--staide: unknown flag; did you mean --stride?" in lines[3]
    assert main(["los", "somewhere"]) == 2
    assert "COMMAND: got 'los'; expected one of loss, " in capsys.readouterr().err
    assert main(["loss"]) == 2
    assert "required: model" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["loss", "--help"])
    assert "--stride" in capsys.readouterr().out


def test_command_line_errors_are_reported_before_heavy_imports() -> None:
    program = (
        "import sys; from tjx_eval.main import main; assert main(['loss', 'x', '--y']) == 2; "
        "print([name for name in ('jax', 'numpy', 'matplotlib', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_the_version_is_printed_by_the_module() -> None:
    command = [sys.executable, "-m", "tjx_eval", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"tjx-eval {tjx_eval.__version__}\n", done.stderr


def test_piped_tables_have_all_digits_and_no_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row: dict[str, Metric] = {f"quantity_{k}": 1234567 + k for k in range(9)}
    print_rows([{"name": "a long text " * 9, **row}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split()[-9:] == [f"{value:,}" for value in row.values()]
    assert "quantity 8" in lines[-2]
    assert main(["loss", "no\x1b[31mrun"]) == 2
    assert "no\\x1b[31mrun: no such directory" in capsys.readouterr().err


def test_a_corpus_is_scored_on_its_official_validation_split(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(run_dir)
    opened: list[str] = []

    def load(name: str) -> tjx_data.Documents:
        opened.append(name)
        return tjx_data.Documents.of(lambda: ["a text"], {})

    monkeypatch.setattr(tjx_data, "load_corpus", load)
    for name in ("wikitext-103", "wikitext-103:test", "python-docs"):
        assert [each.text for each in load_texts(model, corpus=name).documents] == ["a text"]
    assert opened == ["wikitext-103:validation", "wikitext-103:test", "python-docs"]


MISTAKES = [
    ("{tmp}/nothing", "no such directory"),
    ("{tmp}", "got a directory of runs; give one of them, such as {tmp}/new"),
    ("{tmp}/new", "there is no checkpoint yet; the trainer saves the first at step 2"),
    ("{run}/checkpoints", "got a part of the model directory {run}; give {run}"),
    ("{run}/checkpoints/4", "give {run} --step 4"),
    ("{run}/config.yaml", "got a file; expected a model directory; give {run}"),
    ("{tmp}/plain", "found neither config.yaml"),
    ("{tmp}/no_tokenizer", "tokenizer.json is missing"),
    ("{tmp}/no_weights", "found neither model.safetensors nor"),
    ("{run} --step 3", "there is no checkpoint of step 3; it has 2, 4"),
    (
        "{hf} --data {tmp}/text.txt --step 4",
        "{hf} is a Transformers model without steps",
    ),
    ("{run} --tokenizer {tmp}/bytes.json", "is not the tokenizer that {run} was trained with"),
    ("{hf} --data {tmp}/text.txt --tokenizer {tmp}/bytes.json", "tokens; the model in {hf} has"),
    ("{run} --data {tmp}/none*.txt", "this pattern matches no file"),
    ("{run} --data {tmp}/text.txt --corpus python-docs", "--data: not supported with --corpus"),
    ("{run} --corpus python-dogs", "did you mean python-docs?"),
    ("{run} --window 17", "--window: got 17; expected at most max_seq_len, 16"),
    ("{run} --stride 20", "--stride: got 20; expected at most the window, 16"),
    ("{run} --csv {tmp}/a.csv", "give --per_document too"),
    ("{run} --data {tmp}/foreign.txt", "text: got the characters"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_reported_in_one_line(
    words: str,
    message: str,
    run_dir: Path,
    transformers: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in ("new", "plain", "no_tokenizer", "no_weights"):
        (tmp_path / folder).mkdir()
    shutil.copy(run_dir / "config.yaml", tmp_path / "new")
    shutil.copy(run_dir / "tokenizer.json", tmp_path / "new")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(transformers / name, tmp_path / "no_tokenizer")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(transformers / name, tmp_path / "no_weights")
    byte_tokenizer().save(tmp_path / "bytes.json")
    (tmp_path / "text.txt").write_text("12 sheep and more more\n")
    (tmp_path / "foreign.txt").write_text("12 Schäfchen\n")
    places = {"tmp": tmp_path, "run": run_dir, "hf": transformers}
    assert main(["loss", *words.format(**places).split()]) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error
    assert len(error.splitlines()) == 1
