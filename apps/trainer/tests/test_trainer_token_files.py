"""Runs on the token files of nanoGPT's prepare.py, by flags and by --nanogpt."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from one_device import one_device  # noqa: F401

from tjx_core import ConfigError
from tjx_trainer.cli.nanogpt.translate import translate
from tjx_trainer.main import main

TINY = {
    "model.n_layer": 1, "model.n_head": 2, "model.d_model": 16, "model.max_seq_len": 16,
    "data.seq_len": 16, "train.batch_size": 8, "train.eval_every": 4, "train.sample_tokens": 8,
    "log.every": 1, "schedule.name": "constant", "schedule.warmup_steps": 0,
}  # fmt: skip


def run(**changes: object) -> None:
    words = [f"--{name}={value}" for name, value in {**TINY, **changes}.items()]
    with jax.transfer_guard("allow"):
        assert main(words) == 0


def refused(capsys: pytest.CaptureFixture[str], **changes: object) -> str:
    """Return the message of a run that ends with a user error."""
    with pytest.raises(SystemExit, match="2"):
        run(**changes)
    return capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write files as prepare.py does: ids [0, 200) as uint16 without a header."""
    ids = (np.arange(4000) * 7 % 200).astype(np.uint16)
    ids[:3600].tofile(tmp_path / "train.bin")
    ids[3600:].tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(b"not a pickle: reading it would fail")
    return tmp_path


def test_train_bin_trains_without_a_tokenizer_and_resumes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: dict[str, object] = {
        "data.path": folder, "model.vocab_size": 200, "run_dir": folder / "run"
    }  # fmt: skip
    run(**words, **{"train.max_steps": 2})
    printed = capsys.readouterr()
    assert "3,600 tokens to train on, 400 held out, no tokenizer" in printed.err
    assert "no text samples and no bits per byte" in printed.err
    assert "perplexity" in printed.out
    assert "bits per byte" not in printed.out
    assert not (folder / "run" / "tokenizer.json").exists()
    words["train.max_steps"] = 4
    run(**words)
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 3, 4]
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2])
    assert "the data changed since this run was started" in refused(capsys, **words)


def test_vocabulary_comes_from_the_tokenizer_or_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: dict[str, object] = {
        "data.path": folder / "train.bin", "run_dir": folder / "run", "train.max_steps": 1
    }  # fmt: skip
    message = refused(capsys, **words)
    assert "whose largest id is 199; give --data.tokenizer, or --model.vocab_size 200" in message
    message = refused(capsys, **words, **{"model.vocab_size": 199})
    assert "got token id 199 as uint16; expected ids below" in message
    message = refused(capsys, **words, **{"model.family": "bert", "data.tokenizer": "byte"})
    assert "token ids are for model.family gpt" in message
    run(**words, **{"data.tokenizer": "byte"})
    assert "bits per byte" in capsys.readouterr().out
    assert (folder / "run" / "tokenizer.json").exists()


def test_nanogpt_reads_the_files_of_its_data_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    own = Path("data/own")
    own.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        (folder / name).rename(own / name)

    def words(*more: str) -> list[str]:
        return translate(["--nanogpt", "--dataset=own", *more]).words

    assert {"--data.path=data/own", "--model.vocab_size=50304"} <= set(words())
    (own / "meta.pkl").touch()  # its vocabulary size is unknown: the user gives it
    assert not any(word.startswith("--model.vocab_size") for word in words())
    assert "--model.vocab_size=200" in words("--model.vocab_size=200")
    (own / "val.bin").unlink()
    with pytest.raises(ConfigError, match="--dataset=own"):
        words()
