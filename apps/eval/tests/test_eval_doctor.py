"""`doctor`: supported and unsupported models, sizes against counts by hand."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tjx_eval.errors import EvalError
from tjx_eval.main import main
from tjx_eval.scoring.transformers_logits import compare_logits
from tjx_nn import GPTConfig, hf, init

# Llama 3.2 1B without its tied head: https://huggingface.co/meta-llama/Llama-3.2-1B config.json
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


def doctor(folder: Path, config: dict[str, Any], *more: str) -> tuple[int, dict[str, Any]]:
    (folder / "config.json").write_text(json.dumps(config))
    code = main(["doctor", str(folder), "--json", str(folder / "found.json"), *more])
    return code, json.loads((folder / "found.json").read_text())


def test_memory_is_that_of_counts_by_hand(tmp_path: Path) -> None:
    code, found = doctor(tmp_path, LLAMA, "--context", "8192", "--memory", "24")
    block = 2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192 + 2 * 2048
    count = 128256 * 2048 + 16 * block + 2048
    assert code == 0
    assert found["problems"] == []
    assert found["parameters"] == count == 1_235_814_400
    assert found["weights, bfloat16"] == f"{2 * count / 1e9:.2f} GB"
    assert found["training fits"] == "yes"  # 19.8 GB
    cache = 16 * 2 * 512 * 2 * 8192
    assert found["KV cache, bfloat16"] == f"{cache / 1e9:.2f} GB a sequence"
    assert found["sequences that fit, bfloat16"] == (24 * 10**9 - 2 * count) // cache
    assert found["files"] == "none: weights not compared"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "model_type: got 'mamba'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: got"),
        ({"sandwich": 3}, "sandwich: got 3; expected no such key"),
    ],
)
def test_what_is_not_supported_is_named(
    change: dict[str, Any], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = doctor(tmp_path, LLAMA | change)
    assert code == 1
    assert found["supported"] == "no"
    assert problem in "\n".join(found["problems"])
    assert problem in capsys.readouterr().out


def test_mistakes_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert main(["doctor", str(tmp_path)]) == 1
    assert "as a pickle can execute code" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path), "--memory", "0"]) == 2


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter that writes the logits of the file logits.npy instead of running a program."""
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport shutil, sys\nassert 'AutoModelForCausalLM' in sys.argv\n"
        f"shutil.copy({str(tmp_path / 'logits.npy')!r}, sys.argv[-1])\nprint('5.0.0')\n"
    )
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("error", "code"), [(0.0, 0), (0.02, 1), (float("nan"), 1)], ids=["same", "differs", "nan"]
)
def test_logits_are_compared_with_those_of_transformers(
    error: float, code: int, python: Path, tmp_path: Path
) -> None:
    """A folder whose model has a constant logit for each token: all else is zero."""
    folder = tmp_path / "model"
    config = GPTConfig(
        vocab_size=7, max_seq_len=8, n_layer=1, n_head=1, d_model=4, tied_head=False,
        norm="rmsnorm", activation="swiglu", positions="rope", bias=False,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    params["wte"]["embedding"] += 1.0
    params["ln_f"]["scale"] += 2.0
    params["head"]["embedding"] += np.arange(7, dtype=np.float32)[:, None]
    hf.save(folder, config, params)
    logits = np.tile(np.arange(7, dtype=np.float32) * 4 * 2, (2, 8, 1))
    logits[1, 3, 2] += error
    np.save(tmp_path / "logits.npy", logits)
    arguments = ["--transformers", str(python), "--json", str(tmp_path / "found.json")]
    assert main(["doctor", str(folder), *arguments]) == code
    found = json.loads((tmp_path / "found.json").read_text())
    assert "from Transformers 5.0.0 (std " in found["logits"]
    assert [problem.partition(":")[0] for problem in found["problems"]] == ["logits"] * code


def test_an_interpreter_without_transformers_is_an_error(python: Path, tmp_path: Path) -> None:
    for program, message in ((python, "exit code 1"), (tmp_path / "none", "No such file")):
        with pytest.raises(EvalError, match=message):
            compare_logits(tmp_path, GPTConfig(vocab_size=7), {}, str(program))
