"""The loss computed by two processes equals that of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from eval_tiny_run import tiny_run

# Slow: each process imports JAX and compiles.
pytestmark = pytest.mark.slow

TIMEOUT = 300  # seconds


def loss(count: int, words: list[str], out: Path) -> dict[str, float]:
    """Compute the loss with several processes, which find each other by environment variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
    }
    command = [sys.executable, "-m", "tjx_eval.main", "loss", *words, f"--json={out}"]
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, "JAX_PROCESS_ID": str(index)},
        )
        for index in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count, outputs
    # Only process 0 prints, apart from messages of Gloo.
    printed = [[line for line in out.splitlines() if "[Gloo]" not in line] for out, _ in outputs]
    assert [bool(lines) for lines in printed] == [True] + [False] * (count - 1), outputs
    found: dict[str, float] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("words", [[], ["--window=16", "--stride=8", "--per_document"]])
def test_two_processes_compute_the_loss_of_one(words: list[str], tmp_path: Path) -> None:
    one, two = (loss(n, [str(tiny_run()), *words], tmp_path / f"{n}.json") for n in (1, 2))
    for name in ("loss", "bits_per_byte", "top1_accuracy", "top10_accuracy"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)
    assert (two["tokens"], two["text_bytes"]) == (one["tokens"], one["text_bytes"])


def test_perplexity_does_not_depend_on_batch_size_and_processes(tmp_path: Path) -> None:
    if "TJX_TEST_DATA" not in os.environ:
        pytest.skip("TJX_TEST_DATA is not set")
    text = Path(os.environ["TJX_TEST_DATA"]) / "wikitext2" / "valid.txt"
    run = wikitext_run(text, tmp_path)
    # Disjoint windows, as in training, and all of the text: 1.1 million characters.
    words = [str(run), f"--data={text}", "--window=64", "--stride=64"]
    found = [
        loss(count, [*words, f"--batch_size={rows}"], tmp_path / "found.json")
        for count, rows in ((1, 64), (1, 7), (2, 64))
    ]
    lengths = len(text.read_bytes())
    for each in found:
        assert each["perplexity"] == pytest.approx(found[0]["perplexity"], rel=1e-6)
        assert each["text_bytes"] == lengths - 1  # the first token is not scored
        assert each["tokens"] == found[0]["tokens"]


def wikitext_run(text: Path, folder: Path) -> Path:
    """Train a tiny model on the text for a few steps."""
    from tjx_trainer import main as trainer

    words = [
        "--model.n_layer=1", "--model.n_head=2", "--model.d_model=16", "--model.max_seq_len=64",
        "--data.seq_len=64", "--data.tokenizer=char", "--data.holdout=tail", f"--data.path={text}",
        f"--data.cache_dir={folder / 'cache'}", "--train.max_steps=20", "--train.batch_size=16",
        "--train.eval_every=20", "--train.eval_tokens=1000", "--train.sample_tokens=0",
        f"--run_dir={folder / 'run'}",
    ]  # fmt: skip
    assert trainer.main(words) == 0
    return folder / "run"
