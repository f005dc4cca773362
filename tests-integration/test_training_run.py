"""End to end with the real programs: train, kill, resume, evaluate."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from campaigns.tiny_run import TINY, clean_environment

TRAINER = [sys.executable, "-m", "tjx_trainer.main"]
EVAL = [sys.executable, "-m", "tjx_eval.main"]

WORDS = {**TINY, "train.sample_tokens": 20, "log.every": 5}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment with an empty home and the modules of this sandbox."""
    return clean_environment(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a rhyme with lines of different lengths as training text."""
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    lines = (f"{n % 10} and {'over ' * (n % 7)}the wall they run\n" for n in range(1500))
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def words(text: Path) -> list[str]:
    return [
        *TRAINER,
        *(word for name, value in WORDS.items() for word in (f"--{name}", str(value))),
        *("--data.path", str(text)),
    ]


@pytest.fixture(scope="module")
def finished(
    words: list[str], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Return an undisturbed run and its output."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    done = subprocess.run(
        [*words, "--run_dir", str(run_dir)],
        env=environment, capture_output=True, text=True, check=False, cwd=run_dir.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout + done.stderr


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[tuple[str, float], float]:
    """Return every logged loss by name and step."""
    return {
        (name, record["step"]): record[name]
        for record in records(run_dir)
        for name in ("train/loss", "train/grad_norm", "eval/loss")
        if name in record
    }


def test_run_directory_is_complete(finished: tuple[Path, str]) -> None:
    run_dir, printed = finished
    for name in ("config.yaml", "metrics.jsonl", "tokenizer.json", "plots/loss.png"):
        assert (run_dir / name).stat().st_size > 0, name
    names = set().union(*records(run_dir))
    assert names >= {
        "step",
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/tokens_per_sec",
        "eval/loss",
        "eval/perplexity",
        "eval/bits_per_byte",
    }
    evaluations = [record["eval/loss"] for record in records(run_dir) if "eval/loss" in record]
    assert evaluations[-1] < evaluations[0] - 1.0
    assert "bits per byte" in printed
    assert "xz -9" in printed
    assert str(run_dir) in printed


@pytest.mark.parametrize(
    "number",
    # `test_faults_signals.py` stops runs by SIGTERM too.
    [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
    ids=["kill", "term"],
)
def test_stopped_run_resumes_exactly(
    number: signal.Signals,
    finished: tuple[Path, str],
    words: list[str],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    command = [*words, "--run_dir", str(tmp_path / "run")]
    first = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints / "10").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(number)
    code = first.wait(timeout=60)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    stopped_at = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    assert 10 <= stopped_at < int(TINY["train.max_steps"]), "it was to be stopped on its way"

    second = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert second.returncode == 0, second.stderr
    assert f"step {stopped_at}" in second.stdout + second.stderr
    assert losses(tmp_path / "run") == losses(finished[0])
    steps = [record["step"] for record in records(tmp_path / "run") if "train/loss" in record]
    assert steps == sorted(set(steps))


@pytest.mark.slow  # `test_trainer_run_dir.py` and `test_faults_start.py` have other configurations
def test_another_config_is_rejected(
    finished: tuple[Path, str], words: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [*words, "--run_dir", str(finished[0]), "--seed", "7"],
        env=environment, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "seed" in done.stderr
    assert "Traceback" not in done.stderr


def test_eval_reproduces_the_logged_validation_loss(
    finished: tuple[Path, str], environment: dict[str, str], tmp_path: Path
) -> None:
    run_dir, _ = finished
    report = tmp_path / "loss.json"
    # Not the batch size of the run; `test_eval_program.py` has others.
    command = [*EVAL, "loss", str(run_dir), "--json", str(report), "--batch_size", "3"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    found = json.loads(report.read_text())
    last = [record for record in records(run_dir) if "eval/loss" in record][-1]
    assert found["loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(last["eval/bits_per_byte"], rel=1e-5)
    assert 0 < found["top1_accuracy"] <= found["top5_accuracy"] <= found["top10_accuracy"] <= 1


@pytest.mark.slow  # `test_eval_generate.py` generates texts twice too
def test_eval_generates_the_same_text_for_the_same_seed(
    finished: tuple[Path, str], environment: dict[str, str], tmp_path: Path
) -> None:
    command = [
        *EVAL, "generate", str(finished[0]), "--prompt", "3 and ", "--max_new_tokens", "12"
    ]  # fmt: skip
    texts = [
        subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
        ).stdout
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("3 and ")


@pytest.mark.slow  # `test_eval_program.py` has the same in its process
def test_eval_reports_invalid_folders(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [*EVAL, "loss", str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "config.yaml" in done.stderr
    assert "Traceback" not in done.stderr
