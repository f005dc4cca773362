"""Latent and top-k attention of a loaded decoder: equal losses where exact, and clear errors."""

import dataclasses
import json
from pathlib import Path

import pytest
from eval_tiny_run import tiny_run

from tjx_eval.convert_attention import AttentionOptions, convert_attention
from tjx_eval.load_model import load_model
from tjx_eval.main import main
from tjx_nn import SparseConfig


def loss(tmp_path: Path, *words: str) -> dict[str, float]:
    out = tmp_path / "loss.json"
    assert main(["loss", str(tiny_run()), "--json", str(out), *words]) == 0
    result: dict[str, float] = json.loads(out.read_text())
    return result


def test_the_loss_by_rank_and_by_number_of_keys(tmp_path: Path) -> None:
    plain = loss(tmp_path)["loss"]
    # A key and a value have 32 features, of the width 16: the full rank halves the cache.
    full = loss(tmp_path, "--use_mla", "16", "--sparse_top_k", "16")
    assert full["loss"] == pytest.approx(plain, rel=1e-6)
    assert full["kv_cache_bytes_per_token"] == 2 * 16 * 4
    few = loss(tmp_path, "--use_mla", "2", "--sparse_top_k", "1", "--quantization", "int8")
    assert few["loss"] != pytest.approx(plain, rel=1e-5)
    assert few["kv_cache_bytes_per_token"] == 2 * 2 * 4


def test_the_converted_model_generates(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(tiny_run()), "--prompt", "12 sh", "--temperature", "0"]
    texts = []
    for more in ([], ["--use_mla", "16"], ["--sparse_top_k", "64"]):
        assert main([*words, "--max_new_tokens", "8", *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts == [texts[0]] * 3


def test_a_trained_indexer_is_kept() -> None:
    model = load_model(tiny_run())
    assert convert_attention(model, AttentionOptions()) is model
    for trained, indexer in ((SparseConfig(top_k=9), True), (SparseConfig(), False)):
        before = dataclasses.replace(
            model, architecture=dataclasses.replace(model.gpt, sparse=trained)
        )
        after = convert_attention(before, AttentionOptions(sparse_top_k=3)).gpt.sparse
        assert (after.top_k, after.indexer) == (3, indexer)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use_mla", "17"], "--use_mla: rank: got 17; expected 1 to 16"),
        (["--mla_rope_heads", "1"], "give --use_mla too"),
        (["--use_mla", "4", "--mla_rope_heads", "1"], "None without rotary embeddings"),
    ],
)
def test_errors_name_the_flag(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["loss", str(tiny_run()), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use_mla", "4"], "latent.use_norm: got False"),
        (["--format", "gguf", "--use_mla", "4"], "latent.kv_dim"),
        (["--format", "peft", "--sparse_top_k", "4"], "--sparse_top_k: not used"),
    ],
    ids=["hf", "gguf", "peft"],
)
def test_formats_without_such_attention_refuse_it(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("model.gguf" if "gguf" in words else "model")
    assert main(["export", str(tiny_run()), str(out), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not out.exists()
