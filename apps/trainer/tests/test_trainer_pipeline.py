"""Pipelines: stages that start from each other, resumed bit for bit, and mistakes in their list."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from one_device import only_one_device
from process_harness import records

import tjx_ckpt
from tjx_core import ConfigError
from tjx_trainer.main import main
from tjx_trainer.pipeline import pipeline_command
from tjx_trainer.pipeline.stages import pipeline_names, read_pipeline
from tjx_trainer.rl import grpo_task
from tjx_trainer.rl.rollouts import sample_responses
from tjx_trainer.runtime.watchdog import Watchdog

MICRO = """
common:
  model: {n_layer: 1, n_head: 2, d_model: 16, max_seq_len: 96}
  mesh: {data: 1}
  train: {max_steps: 4, batch_size: 8, eval_every: 4, eval_tokens: 100, sample_tokens: 0}
  optimizer: {learning_rate: 1e-2}
  log: {every: 1, samples_every: 4}
  checkpoint: {every: 2}
stages:
  - name: pretrain
    data: {corpus: tiny-chat, tokenizer: char, chat_tokens: true, seq_len: 16, max_documents: 300}
  - name: sft
    task: sft
    data: {corpus: tiny-chat, seq_len: 80, max_documents: 100}
  - name: grpo
    task: grpo
    data: {corpus: tiny-chat, seq_len: 24}
    rl: {chat: true, max_new_tokens: 4, samples_per_prompt: 4, epochs: 2, eval_prompts: 8}
"""
STAGES = ("pretrain", "sft", "grpo")


class Killed(BaseException):
    """Ends a process without warning."""


def kill(*_: object) -> Any:
    raise Killed


def launch(words: Sequence[str]) -> int:
    with only_one_device(), jax.transfer_guard("allow"):
        return main(words)


def words_of(folder: Path, text: str = MICRO) -> list[str]:
    file = folder.with_suffix(".yaml")
    file.write_text(text)
    cache = folder.parent.parent / "cache"
    return ["--config", str(file), f"--pipeline.dir={folder}", f"--data.cache_dir={cache}"]


def checkpoint(folder: Path, stage: str) -> dict[str, bytes]:
    """Return the files of the last checkpoint of a stage."""
    place = folder / stage / "checkpoints"
    newest = place / str(max(tjx_ckpt.list_steps(place)))
    return {p.name: p.read_bytes() for p in newest.rglob("*") if p.suffix == ".safetensors"}


@pytest.mark.parametrize(
    "killed_within",
    # `test_trainer_rl.py` kills and resumes GRPO too.
    [("sft",), pytest.param(("sft", "grpo"), marks=pytest.mark.slow)],
    ids="-".join,
)
def test_a_killed_pipeline_resumes_bit_for_bit_and_reports_each_stage(
    killed_within: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TJX_EXTENSIONS", "")
    folders = [tmp_path / "a" / "whole", tmp_path / "b" / "killed"]
    for folder in folders:
        folder.parent.mkdir()
    whole, killed = folders
    monkeypatch.chdir(whole.parent)
    assert pipeline_command.run(words_of(whole), launch=launch) == 0
    said = capsys.readouterr().out
    assert f"generate {whole / 'grpo'} --chat --interactive" in said
    page = (whole / "report.html").read_text()
    for number, stage in enumerate(STAGES, 1):
        assert f"<h1>{stage}</h1>" in page
        assert f"id='stage{number}-summary'" in page
    assert "Accuracy of held-out responses of grpo" in page

    started: list[str] = []

    def launch_until_killed(words: Sequence[str]) -> int:
        stage = next(Path(w).name for w in words if w.startswith("--run_dir="))
        started.append(stage)
        if stage not in killed_within:  # finished, but killed before the next stage
            shutil.copytree(whole / stage, killed / stage)
            kill()
        with pytest.MonkeyPatch.context() as patch:
            if started.count(stage) == 1 and stage == "sft":  # evaluated, but not saved
                patch.setattr(
                    Watchdog, "beat", lambda _, *now: kill() if now == ("save", 4) else None
                )
            elif started.count(stage) == 1:  # in the third rollout
                sample, calls = sample_responses, iter(range(9))
                patch.setattr(
                    grpo_task, "sample_responses",
                    lambda *a, **k: kill()
                    if not k["greedy"] and next(calls) == 2
                    else sample(*a, **k),
                )  # fmt: skip
            return launch(words)

    for stage in STAGES:
        with pytest.raises(Killed):
            pipeline_command.run(words_of(killed), launch=launch_until_killed)
        assert started[-1] == stage
    assert pipeline_command.run(words_of(killed), launch=launch_until_killed) == 0
    assert started == [s for s in STAGES for _ in range(1 + (s in killed_within))]
    for stage in STAGES:
        assert checkpoint(killed, stage) == checkpoint(whole, stage)
        assert checkpoint(whole, stage)
        assert records(killed / stage)[-1] == records(whole / stage)[-1]
    assert pipeline_command.run(words_of(killed), launch=kill) == 0  # finished stages are skipped
    changed = words_of(killed, MICRO.replace("epochs: 2", "epochs: 3"))
    with pytest.raises(SystemExit):
        pipeline_command.run(changed, launch=kill)
    assert "grpo: rl.epochs: 2 there, 3 here" in capsys.readouterr().err


def test_a_failed_stage_ends_the_pipeline(tmp_path: Path) -> None:
    started = []

    def fail(words: Sequence[str]) -> int:
        started.append(words)
        return 7

    assert pipeline_command.run(words_of(tmp_path / "p"), launch=fail) == 7
    assert len(started) == 1


@pytest.mark.parametrize("name", pipeline_names())
def test_the_shipped_pipelines_are_valid(name: str) -> None:
    grid = read_pipeline(name, ["--seed=3", "--supervise"], None)
    first, second, *_ = grid.combinations
    assert not any(word.startswith("--train.init_from") for word in first.words)
    assert f"--train.init_from=runs/pipeline-{name}/{first.name}" in second.words
    assert all({"--seed=3", "--supervise"} <= {*each.words} for each in grid.combinations)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task: sft", "taks: sft", "(stage 2):13: taks: unknown key; did you mean task?"),
        ("task: sft", "task: stf", "stage sft: task: got 'stf'; expected one of none, sft"),
        ("    task: sft", "    config: quikstart", "stage sft: --config: got quikstart; expected"),
        ("name: sft", "name: pretrain", "got 2 stages pretrain; expected different names"),
        ("name: sft", "name: a/b", "(stage 2): name: got 'a/b'; expected the name of a folder"),
        ("  - name: sft", "  -", "(stage 2): name: got ''; expected the name of a folder"),
        ("task: sft", "run_dir: x", "(stage 2): got run_dir; expected none"),
        ("task: sft", "task: sft\n    model: {d_model: 32}",
         "stage sft: model.d_model: got 32; expected 16, that of stage pretrain"),
        ("samples_per_prompt: 4", "samples_per_prompt: 3",
         "stage grpo: train.batch_size: got 8; expected a multiple of rl.samples_per_prompt=3"),
        ("stages:", "steps:", "got steps; expected the keys common and stages"),
        (MICRO, "stages: 3", "got no stages; expected a list"),
        (MICRO, "stages: [3]", "(stage 1): expected sections"),
        (MICRO, "stages: [", "not YAML"),
    ],
)  # fmt: skip
def test_mistakes_in_a_list_of_stages_are_named_before_anything_starts(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert MICRO.count(old) >= 1
    with pytest.raises(SystemExit):
        pipeline_command.run(words_of(tmp_path / "p", MICRO.replace(old, new, 1)), launch=kill)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config: got none; expected one path, or one of tiny_chat"),
        (["--config=tiny_caht"], "got tiny_caht; expected a path or one of tiny_chat"),
        (["--config=tiny_chat", "--run_dir=x"], "--run_dir: every stage has its own"),
        (["--config=tiny_chat", "--dry_run"], "--dry_run: got true; a pipeline trains"),
        (["--config=tiny_chat", "--pipeline.dri=x"], "did you mean --pipeline.dir?"),
    ],
)
def test_mistakes_in_the_command_line_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        pipeline_command.run(words, launch=kill)
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError):
        read_pipeline("missing.yaml", [], None)
