"""Commands of the guides run with small settings, and Python blocks as they are."""

from pathlib import Path
from typing import Any

import jax
import pytest
from guide_commands import BLOCK, ROOT, commands

import tjx_eval.main
import tjx_metrics.main
import tjx_trainer.main

# Replaces values of the trainer's commands.
SMALL = {
    "--model.n_layer": "1", "--model.d_model": "32", "--model.n_head": "2", "--data.seq_len": "32",
    "--model.max_seq_len": "32", "--data.path": "text.txt", "--data.vocab_size": "270",
    "--train.max_steps": "3", "--train.batch_size": "8", "--train.sample_tokens": "0",
    "--data.cache_dir": "cache",
}  # fmt: skip
PROGRAMS = {"trainer": tjx_trainer.main.main, "eval": tjx_eval.main.main}


def run(words: list[str]) -> int:
    """Run a command of a guide in this process."""
    if words[0] == "tjx-metrics":
        return tjx_metrics.main.main(words[1:])
    program = words[2].removeprefix("apps/")
    given = words[4:]
    if program == "trainer":
        given += [word for pair in SMALL.items() for word in pair]
    return PROGRAMS[program](given)


def test_commands_of_the_quickstart_and_its_results_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "".join(f"{n % 7} sheep over {n % 10} walls\n" for n in range(600))
    (tmp_path / "text.txt").write_text(lines)
    pages = (ROOT / "README.md", ROOT / "docs" / "quickstart.md", ROOT / "docs" / "metrics.md")
    of_the_run = [
        command.words
        for page in pages
        for command in commands(page)
        if "runs/quickstart" in command.words and "compare" not in command.words
    ]
    unique = [list(words) for words in dict.fromkeys(map(tuple, of_the_run))]
    assert len(unique) == 7, "train, generate, loss, attention, two plots, report"
    for words in unique:
        assert run(words) == 0, words
    printed = capsys.readouterr().out
    assert "bits per byte" in printed
    made = {path.name for path in (tmp_path / "runs" / "quickstart").iterdir()}
    # The table of files in the quickstart.
    assert made >= {"config.yaml", "metrics.jsonl", "checkpoints", "plots", "tokenizer.json"}
    assert "report.html" in made


@pytest.mark.parametrize("name", ["index", "models", "attention_kernels"])
def test_python_blocks_run(name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = [block for language, block in BLOCK.findall(page) if language == "python"]
    assert blocks
    with jax.transfer_guard("allow"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, f"<{name}.md>", "exec"), names)  # noqa: S102  the guide's code
