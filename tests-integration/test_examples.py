"""Every script of examples/ runs in this process and prints what it promises."""

import ast
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import pytest

import tjx_nn

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}


class Example:
    """Names and output of a script."""

    def __init__(self, names: dict[str, Any], output: str) -> None:
        self.names, self.output = names, output

    def number(self, label: str) -> float:
        """Return the number behind a label in the output."""
        found = re.search(rf"{label} +(-?[\d.]+(?:e-?\d+)?)", self.output)
        assert found is not None, self.output
        return float(found[1])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run_script(name: str, *words: str) -> Example:
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS[name]), *words])
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        with jax.transfer_guard("allow"), jax.numpy_rank_promotion("allow"):
            names = runpy.run_path(str(SCRIPTS[name]))
        return Example(names, capsys.readouterr().out)

    return run_script


def test_scripts_are_ten_short_listed_and_say_how_to_run() -> None:
    assert len(SCRIPTS) == 10
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for name, path in SCRIPTS.items():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 60, name
        assert f"](../examples/{name}.py)" in page, name
        docstring = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
        assert f"./pants run examples/{name}.py" in docstring, name
        assert f"python examples/{name}.py" in docstring, name
        assert "print" in docstring, name


def test_custom_mask(run: Any) -> None:
    example = run("custom_mask")
    assert example.number("largest difference") < 1e-5
    assert "query 1 sees keys  [0, 1, 2]\n" in example.output


def test_nnx_model_with_muon(run: Any) -> None:
    example = run("nnx_model_with_muon")
    assert example.names["losses"][-1] < 0.02 < 0.3 < example.names["losses"][0]
    assert "step 0: 0.0018\n" in example.output, "warm-up"
    assert "step 50: 0.0200\n" in example.output


def test_own_tokens(run: Any) -> None:
    example = run("own_tokens")
    assert "the same batch again: True" in example.output
    assert example.names["losses"][-1] < 0.1 < 2.5 < example.names["losses"][0]
    assert ((example.names["batch"]["tokens"] + 1) % 16 == example.names["batch"]["labels"]).all()


def test_sharded_step_trains_as_one_device_does(run: Any) -> None:
    text = SCRIPTS["sharded_step"].read_text(encoding="utf-8")
    assert not {"tjx_trainer", "tjx_eval"} & set(re.findall(r"tjx_\w+", text)), "packages only"
    example = run("sharded_step")
    model, batch = example.names["model"], jax.device_get(example.names["batch"])
    with jax.transfer_guard("allow"):
        params = jax.jit(tjx_nn.init, static_argnums=0)(model, jax.random.key(0))
        alone = jax.jit(lambda params: tjx_nn.bind(model, params).losses(**batch).tokens.mean())
        assert example.names["losses"][0] == pytest.approx(float(alone(params)), abs=1e-5)
    assert example.names["losses"][-1] < example.names["losses"][0] - 0.5
    assert "per device (2, 16, 64)" in example.output, "fsdp x tensor"


def test_checkpoint_any_pytree(run: Any) -> None:
    output = run("checkpoint_any_pytree").output
    assert "damaged files of step 200: 1\n" in output
    assert "restored step 100 {'note': 'before'}\nequal leaves: True\n" in output
    assert "file: 3 bfloat16 2" in output


def test_log_metrics(run: Any, tmp_path: Path) -> None:
    output = run("log_metrics").output
    # loss 1.6413 nats: exp(1.6413), and 1641.3 / (4100 ln 2) bits
    assert "{'step': 40, 'eval/loss': 1.641, 'eval/perplexity': 5.162, " in output
    assert "'eval/bits_per_byte': 0.578}" in output
    assert len(list(tmp_path.glob("*/loss.png"))) == 1


def test_text_perplexity(run: Any) -> None:
    example = run("text_perplexity")
    assert example.number("perplexity") == pytest.approx(257, abs=0.01)
    assert example.number("bits per byte") == pytest.approx(8.0056, abs=1e-4)


def test_hugging_face(run: Any, tmp_path: Path) -> None:
    example = run("hugging_face")
    assert "gpt: 8,448 parameters, 1 layers" in example.output
    assert example.output.count("nats)") == 2
    text = tmp_path / "text.txt"
    text.write_text("Another text.", encoding="utf-8")
    other = run("text_perplexity", example.names["folder"], str(text))
    assert "13 tokens, 13 bytes" in other.output
    assert 200 < other.number("perplexity") < 330, "an untrained model of 257 ids"


def test_export_model(run: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Orbax
        output = run("export_model").output
    assert re.findall(r"^(\w+) .*difference (\S+)$", output, re.MULTILINE) == [
        (name, "0.0") for name in ("hf", "peft", "orbax", "file")
    ]
