"""`--average`: the mean of the parameters of several checkpoints of a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from eval_tiny_run import tiny_run

import tjx_ckpt
from tjx_ckpt.lookup import Checkpoint, find_directory
from tjx_eval.load_model import load_model
from tjx_eval.main import main
from tjx_trainer.training.pretrained import load_pretrained


def mean_of_the_run() -> Any:
    """Mean of what is evaluated of both checkpoints, in float64."""
    steps = [jax.device_get(load_model(tiny_run(), step=step).params) for step in (2, 4)]
    means = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0, dtype=np.float64), *steps)
    # The averages of the optimizer are averaged, and they differ.
    assert any(jax.tree.leaves(jax.tree.map(lambda x, y: np.any(x != y), *steps)))
    return means


def assert_equal(found: Any, expected: Any) -> None:
    def check(x: Any, y: Any) -> None:
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)

    jax.tree.map(check, jax.device_get(found), expected)


def test_commands_use_the_mean_of_the_last_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(tiny_run(), average=2)
    assert_equal(model.params, mean_of_the_run())
    assert model.name == "run (mean of steps 2, 4)"
    losses = {}
    for flags in ((), ("--step", "2"), ("--average", "2")):
        report = tmp_path / "loss.json"
        assert main(["loss", str(tiny_run()), *flags, "--json", str(report)]) == 0
        losses[flags] = json.loads(report.read_text())
    averaged = losses["--average", "2"]
    assert averaged["averaged_steps"] == "2, 4"
    assert averaged["loss"] not in {losses[()]["loss"], losses["--step", "2"]["loss"]}
    report = tmp_path / "compare.json"
    words = ["--average_b", "2", "--json", str(report)]
    assert main(["compare", str(tiny_run()), str(tiny_run()), *words]) == 0
    compared = json.loads(report.read_text())
    assert (compared["a"], compared["b"]) == ("run (step 4)", "run (mean of steps 2, 4)")
    assert compared["difference"] != 0
    # What evaluations and the trainer's warm start read of an export.
    out = tmp_path / "averaged"
    assert main(["export", str(tiny_run()), str(out), "--average", "2"]) == 0
    assert f"run (mean of steps 2, 4) -> {out}" in capsys.readouterr().out
    assert_equal(load_model(out).params, mean_of_the_run())
    assert_equal(load_pretrained(str(out))[1], mean_of_the_run())


def test_checkpoints_of_other_shapes_dtypes_or_names_raise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run(), run)
    with Checkpoint(find_directory(str(run)), 4) as saved:
        state = {key: saved.leaf(key) for key in saved.manifest.leaves}
    state["params/wpe/embedding"] = state["params/wpe/embedding"][:8]
    state["params/wte/embedding"] = state["params/wte/embedding"].astype(np.float16)
    del state["params/ln_f/scale"]
    with tjx_ckpt.Checkpointer(run / "checkpoints") as checkpointer:
        checkpointer.save(5, state)
    assert main(["loss", str(run), "--average", "2"]) == 2
    error = capsys.readouterr().err
    assert "params/wpe/embedding: requested shape (16, 16), saved (8, 16)" in error
    assert "params/wte/embedding: requested dtype float32, saved float16" in error
    assert "params/ln_f/scale: requested, not saved" in error


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--average", "3"), "--average: got 3; expected at most 2, the number of checkpoints"),
        (("--average", "2", "--step", "2"), "--average: got 2; expected at most 1"),
        (("--average", "1"), "--average: got '1'; expected a whole number of at least 2"),
    ],
)
def test_too_few_checkpoints_raise(
    flags: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["loss", str(tiny_run()), *flags]) == 2
    assert says in capsys.readouterr().err
