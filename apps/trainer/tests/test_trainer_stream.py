"""Runs on a stream: resumed runs have the losses of undisturbed ones."""

import json
import shutil
from pathlib import Path

import jax
import pytest
from one_device import one_device  # noqa: F401

import tjx_ckpt
from tjx_data.loading import stream_rows
from tjx_trainer.main import main

TINY = {
    "model.n_layer": 1, "model.n_head": 2, "model.d_model": 16, "model.max_seq_len": 16,
    "data.seq_len": 16, "data.tokenizer": "byte", "data.stream": "true", "data.shuffle_buffer": 9,
    "train.batch_size": 8, "train.eval_every": 9, "train.sample_tokens": 0, "log.every": 1,
    "train.eval_tokens": 64, "schedule.name": "constant", "schedule.warmup_steps": 0,
    "train.max_steps": 4, "checkpoint.every": 2,
}  # fmt: skip


def test_resumed_run_reads_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stream_rows, "SAVE_SECONDS", 0.0)
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("<|endoftext|>".join(f"{n} sheep and {'more ' * (n % 5)}" for n in range(300)))
    flags = {**TINY, "data.path": text, "data.cache_dir": tmp_path / "cache", "run_dir": run}

    def losses() -> dict[int, float]:
        with jax.transfer_guard("allow"):
            assert main([f"--{name}={value}" for name, value in flags.items()]) == 0
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}

    expected = losses()
    assert sorted(expected) == [1, 2, 3, 4]
    assert "a stream of" in capsys.readouterr().err
    newest = tjx_ckpt.list_steps(run / "checkpoints")[-1]
    (folder,) = (run / "checkpoints").glob(f"*{newest}")
    shutil.rmtree(folder)
    assert losses() == expected
    assert "resum" in capsys.readouterr().err
