"""Exports: read back by tjx and run by ONNX Runtime, they equal the model."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import tokenizers
from eval_tiny_run import tiny_run

from tjx_data import byte_tokenizer
from tjx_eval.commands import export
from tjx_eval.export import onnx
from tjx_eval.export.hf import write_tokenizer
from tjx_eval.load_model import TrainedModel, load_model
from tjx_eval.main import main
from tjx_nn import BertConfig, GPTConfig, bind, hf, init

TOKENS = np.arange(16, dtype=np.int32)[None] % 7


def logits(model: TrainedModel) -> np.ndarray:
    def forward(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        return bind(model.gpt, params)(tokens)

    with jax.transfer_guard("allow"):
        return np.asarray(jax.jit(forward)(jax.device_get(model.params), TOKENS))


def test_a_transformers_export_equals_the_run(tmp_path: Path) -> None:
    out = tmp_path / "hf"
    assert main(["export", str(tiny_run()), str(out)]) == 0
    run, folder = load_model(tiny_run()), load_model(out)
    # The export has the average of the parameters, which is also what is evaluated.
    np.testing.assert_allclose(logits(folder), logits(run), atol=1e-6)
    assert folder.tokenizer.fingerprint == run.tokenizer.fingerprint
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("12 sheep").ids == run.tokenizer.encode("12 sheep")
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation.get("eos_token_id") == run.tokenizer.eot_id
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 16


def test_the_exported_tokenizer_encodes_prompts_as_generate_does(tmp_path: Path) -> None:
    byte, decoder = byte_tokenizer(), load_model(tiny_run()).architecture
    write_tokenizer(byte, decoder, tmp_path)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode("12 sheep").ids == byte.encode_prompt("12 sheep")
    write_tokenizer(byte, BertConfig(), tmp_path)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode("12 sheep").ids == byte.encode("12 sheep")


def test_tensors_have_the_requested_dtype(tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert main(["export", str(tiny_run()), str(out), "--dtype", "bfloat16"]) == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    np.testing.assert_allclose(
        logits(load_model(out)), logits(load_model(tiny_run())), atol=0.1, rtol=0.05
    )


def test_onnx_runtime_computes_the_model_s_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = tmp_path / "onnx", dict(vars(jnp))
    assert main(["export", str(tiny_run()), str(out), "--format", "onnx"]) == 0
    assert "differ from the model's by" in capsys.readouterr().out
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    (found,) = session.run(None, {"tokens": TOKENS})
    np.testing.assert_allclose(found, logits(load_model(tiny_run())), atol=1e-4)
    assert (out / "tokenizer.json").is_file()
    # The converter patches functions of JAX, which must be restored.
    assert [name for name, value in before.items() if vars(jnp)[name] is not value] == []


SMALL: dict[str, Any] = {
    "n_layer": 1,
    "n_head": 2,
    "d_model": 8,
    "max_seq_len": 16,
    "vocab_size": 32,
}
LLAMA: dict[str, Any] = {
    "n_kv_head": 1,
    "positions": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
}


@pytest.mark.parametrize(
    "config", [GPTConfig(**SMALL), GPTConfig(**SMALL, **LLAMA, bias=False), BertConfig(**SMALL)]
)
def test_onnx_with_any_batch_and_length_computes_other_shapes(
    config: GPTConfig | BertConfig, tmp_path: Path
) -> None:
    with jax.transfer_guard("allow"):
        params = init(config, jax.random.key(0))
    model = dataclasses.replace(load_model(tiny_run()), architecture=config, params=params)
    assert onnx.export_onnx(model, tmp_path, batch=None, length=None) < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", "length"]
    for batch, length in ((2, 1), (1, 13)):  # the export checks others
        inputs: dict[str, Any] = onnx.example_inputs(config, batch, length)
        (found,) = session.run(None, inputs)
        with jax.transfer_guard("allow"):
            expected = np.asarray(bind(config, params)(**inputs))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_onnx_inputs_of_encoders_have_the_token_types_of_the_model() -> None:
    assert list(onnx.example_inputs(BertConfig(), 1, 4)) == ["tokens", "token_types", "mask"]
    modern = BertConfig.preset("modernbert_base")
    assert list(onnx.example_inputs(modern, 1, 4)) == ["tokens", "mask"]


def test_any_length_is_an_error_of_other_families(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "_ANY_LENGTH", ("bert",))
    words = ["export", str(tiny_run()), str(tmp_path / "new"), "--format", "onnx"]
    assert main([*words, "--length", "any"]) == 2
    assert "got any with a model of family gpt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/full"], "expected a new or empty directory"),
        (["{tmp}/full/file"], "expected a new or empty directory"),
        (["{tmp}/new", "--format", "onxx"], "did you mean onnx?"),
        (["{tmp}/new", "--length", "8"], "--length: not used with --format hf"),
        (["{tmp}/new", "--format", "onnx", "--dtype", "float16"], "--dtype: not used with"),
        (["{tmp}/new", "--format", "onnx", "--batch", "all"], "--batch: got 'all'"),
        (["{tmp}/new", "--format", "onnx", "--length", "17"], "expected at most max_seq_len, 16"),
        *(
            (
                ["{tmp}/new", "--format", "onnx", size, "any", "--sparse_top_k", "4"],
                "cannot be traced with --batch or --length any",
            )
            for size in ("--batch", "--length")
        ),
    ],
)
def test_invalid_options_are_reported_and_nothing_is_written(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    given = [word.format(tmp=tmp_path) for word in words]
    assert main(["export", str(tiny_run()), *given]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "full" / "file").read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_onnx_parameters_above_the_limit_are_in_a_data_file_and_wrong_logits_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    words = ["export", str(tiny_run()), str(out), "--format", "onnx"]
    monkeypatch.setattr(onnx, "_MAX_BYTES", 1000)
    with monkeypatch.context() as exact:
        exact.setattr(onnx, "ATOL", 0.0)
        assert main(words) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(words) == 0
    graph, data = (out / "model.onnx").stat().st_size, (out / "model.onnx.data").stat().st_size
    params = jax.tree.leaves(load_model(tiny_run()).params)
    assert data >= sum(leaf.nbytes for leaf in params if leaf.nbytes > 256)
    assert f"{graph + data:,} bytes" in capsys.readouterr().out
    (found,) = onnxruntime.InferenceSession(out / "model.onnx").run(None, {"tokens": TOKENS})
    np.testing.assert_allclose(found, logits(load_model(tiny_run())), atol=1e-4)


def test_an_export_succeeds_after_a_killed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, left = tmp_path / "hf", tmp_path / "hf.4194305.tmp"
    left.mkdir()
    (left / "config.json").write_text("{")

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "save", fail)
        assert main(["export", str(tiny_run()), str(out)]) == 5
    assert "free disk space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    flushed: set[int] = set()
    flush = os.fsync

    def note(descriptor: int) -> None:
        flush(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", note)
    assert main(["export", str(tiny_run()), str(out)]) == 0
    assert {path.stat().st_ino for path in (out, tmp_path, *out.iterdir())} <= flushed
