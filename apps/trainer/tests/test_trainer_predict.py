"""Predictions: laws with known constants, intervals that cover, and a command that resumes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_text import flags_of_sheep

from tjx_core import ConfigError
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.scaling import predict_command
from tjx_trainer.scaling.laws import fit_law, predict_loss
from tjx_trainer.scaling.small_runs import Size, read_small_runs, size_of

FLOPS = np.geomspace(1e12, 3e14, 6)[:, None]
TARGET = np.array([4e15])
PREDICT = ["--scale.depth=8", "--data.seq_len=64"]


def loss_of(flops: Any) -> Any:
    return 1.7 + 60 * flops**-0.13


def test_a_law_of_parameters_and_tokens_has_the_constants_of_the_runs() -> None:
    params, tokens = np.meshgrid([1e5, 3e5, 1e6], [2e6, 8e6, 3e7])
    runs = np.stack([params.ravel(), tokens.ravel()], axis=1)[:8]
    law = fit_law(runs, 1.7 + 400 * runs[:, 0] ** -0.34 + 410 * runs[:, 1] ** -0.28)
    assert law.floor == pytest.approx(1.7, abs=0.02)
    assert law.exponents == pytest.approx((0.34, 0.28), abs=0.002)
    large = np.array([[1e7, 1e8]])
    assert law.loss(large)[0] == pytest.approx(1.7 + 400 * 1e7**-0.34 + 410 * 1e8**-0.28, rel=1e-3)


def test_one_failed_run_hardly_changes_the_law() -> None:
    losses = loss_of(np.geomspace(1e12, 3e14, 8))
    losses[3] *= 1.2
    law = fit_law(np.geomspace(1e12, 3e14, 8)[:, None], losses)
    assert law.loss(TARGET[None])[0] == pytest.approx(loss_of(4e15), rel=0.01)


def test_runs_that_do_not_determine_a_floor_have_none() -> None:
    """A power law with noise: a law that always has a floor finds one in half of the samples."""
    rng = np.random.default_rng(0)
    flops = np.repeat(np.geomspace(5e10, 1e12, 8), 3)
    samples = [9 * flops**-0.07 * np.exp(0.007 * rng.normal(size=24)) for _ in range(12)]
    assert sum(fit_law(flops[:, None], losses).floor > 0 for losses in samples) <= 2


def test_the_interval_contains_the_loss_as_often_as_it_says() -> None:
    """Twenty predictions from six runs each; 80 % intervals contain 11 to 20 at p = 0.001."""
    rng = np.random.default_rng(0)
    inside, errors, widths = 0, [], []
    for seed in range(20):
        losses = loss_of(FLOPS[:, 0]) * np.exp(0.003 * rng.normal(size=6))
        measured = float(loss_of(TARGET[0]) * np.exp(0.003 * rng.normal()))
        found = predict_loss(FLOPS, losses, TARGET, confidence=0.8, samples=40, seed=seed)
        inside += found.low < measured < found.high
        errors.append(abs(found.loss / measured - 1))
        widths.append(found.high / found.low - 1)
    assert inside >= 11
    assert np.mean(errors) < 0.015
    assert np.mean(widths) < 0.08


def test_too_few_runs_and_bad_losses_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 3 different runs; expected at least 4 for the 3"):
        fit_law(FLOPS[[0, 1, 2, 2]], np.ones(4))
    with pytest.raises(ConfigError, match="got 4 runs; expected at least 5"):
        predict_loss(FLOPS[:4], loss_of(FLOPS[:4, 0]), TARGET)
    with pytest.raises(ConfigError, match="expected positive numbers"):
        fit_law(FLOPS, np.array([1, 2, 3, 4, 5, np.nan]))


@pytest.mark.parametrize("dial", ["--scale.depth=8", "--scale.flops=1e15"])
def test_small_runs_have_at_most_a_tenth_of_the_flops(dial: str) -> None:
    grid, large = read_small_runs([dial, "--data.seq_len=64", "--seed=3"], 6)
    target = size_of(resolve(large.words))
    assert target == size_of(grid.config)
    configs = [resolve(each.words) for each in grid.combinations]
    flops = [size_of(config).flops for config in configs]
    assert flops == pytest.approx([target.flops / 12 / 2**k for k in range(5, -1, -1)], rel=0.02)
    assert {config.seed for config in configs} == {3}


@pytest.mark.parametrize("vary_tokens", [False, True])
def test_every_size_has_runs_of_each_seed(vary_tokens: bool) -> None:
    words = ["--scale.depth=16", "--seed=1234567"]
    grid, _ = read_small_runs(words, 7, vary_tokens=vary_tokens, seeds=2)
    configs = [resolve(each.words) for each in grid.combinations]
    seeds: dict[Size, set[int]] = {}
    for config in configs:
        seeds.setdefault(size_of(config), set()).add(config.seed)
    assert list(seeds.values()) == [{1234567, 1234568}] * 7
    assert len({each.name for each in grid.combinations}) == 14


def test_half_of_the_runs_of_a_law_of_parameters_and_tokens_have_fewer_tokens() -> None:
    words = ["--scale.flops=1e14", "--scale.width_per_layer=16", "--scale.head_size=16"]
    grid, _ = read_small_runs(words, 8, vary_tokens=True)
    sizes = [size_of(resolve(each.words)) for each in grid.combinations]
    ratios = [size.tokens / size.params for size in sizes]
    # Widths are whole heads.
    assert all(2 < more / fewer < 8 for more, fewer in zip(ratios[::2], ratios[1::2], strict=True))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--scale.depth: got none; expected the size of the run to predict"),
        (
            ["--scale.depth=8", "--train.max_steps=9", "--train.batch_size=1"],
            "got 6 with 1 diff",
        ),
        (["--scale.depth=8", "--run_dir=x"], "--run_dir: every run has its own"),
        (["--predict.runs=9"], "--predict.runs: got 9 with law compute; expected 5 to 8; try 7"),
        (["--predict.law=parametric"], "got 6 with law parametric; expected 7 to 8; try 7"),
        (["--scale.depth=8", "--eval_only"], "--eval_only: got true; expected it without predict"),
        (["--predict.seeds=0"], "--predict.seeds: got 0; expected at least 1"),
        (["--predict.confidence=2"], "--predict.confidence: got 2.0; expected (0, 1)"),
    ],
)
def test_mistakes_are_named(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        predict_command.run([*words, f"--predict.dir={tmp_path / 'p'}"])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


class FakeTrainer:
    """Writes what a run leaves behind, with the loss of a law."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.fails: set[str] = set()

    def __call__(self, words: Sequence[str]) -> int:
        config = resolve(words)
        assert config.run_dir is not None
        run = RunDirectory(Path(config.run_dir))
        self.made.append(run.path.name)
        if run.path.name in self.fails:
            return 1
        run.path.mkdir(parents=True)
        run.write_config(config)
        steps = config.train.max_steps
        loss = float(loss_of(size_of(config).flops)) * (1 + 0.001 * config.seed)
        run.metrics.write_text(json.dumps({"step": steps, "eval/loss": loss}) + "\n")
        (run.checkpoints / str(steps)).mkdir(parents=True)
        return 0


def test_a_prediction_is_written_before_the_large_run_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "p"
    words = [*PREDICT, f"--predict.dir={folder}"]
    trainer = FakeTrainer()
    names = [each.name for each in read_small_runs(PREDICT, 6)[0].combinations]
    assert predict_command.run([*words, "--dry_run"], launch=trainer) == 0
    assert not trainer.made
    assert not folder.exists()
    trainer.fails = {names[3]}
    assert predict_command.run(words, launch=trainer) == 1
    assert not (folder / "prediction.json").exists()
    trainer.fails = {"large,depth=8"}
    assert predict_command.run([*words, "--then"], launch=trainer) == 1  # the large run fails
    assert trainer.made.count(names[0]) == 1
    first = json.loads((folder / "prediction.json").read_text())
    assert first["low"] < first["loss"] < first["high"]
    assert "measured" not in first
    trainer.fails = set()
    assert predict_command.run([*words, "--then"], launch=trainer) == 0
    last = json.loads((folder / "prediction.json").read_text())
    assert last.items() >= first.items()  # the prediction of before, with the outcome
    assert last["inside"]
    assert abs(last["error"]) < 0.01
    assert "measured" in capsys.readouterr().out
    assert (folder / "prediction.png").stat().st_size > 10_000
    # A prediction does not change after its run has been started.
    with pytest.raises(SystemExit):
        predict_command.run([*words, "--predict.confidence=0.5"], launch=trainer)
    assert "its large run has been started with the prediction of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predict_command.run([*words, "--optimizer.b2=0.9"], launch=trainer)
    assert f"--predict.dir {folder}: holds another predict" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_of_a_tiny_dial_are_trained_and_predicted(tmp_path: Path) -> None:
    words = [
        "--scale.depth=6", "--scale.width_per_layer=4", "--scale.head_size=4",
        "--scale.tokens_per_parameter=0.2", "--data.seq_len=16", "--model.max_seq_len=16",
        "--data.tokenizer=char", "--train.sample_tokens=0", "--train.eval_every=1000000",
        *flags_of_sheep(tmp_path),
    ]  # fmt: skip
    folder = tmp_path / "p"
    argv = [*words, f"--predict.dir={folder}", "--predict.runs=5", "--then"]
    assert predict_command.run(argv) == 0
    entry = json.loads((folder / "prediction.json").read_text())
    assert 0 < entry["low"] < entry["loss"] < entry["high"]
    assert entry["target"]["flops"] > 10 * max(each["flops"] for each in entry["runs"])
    assert entry["measured"] > 0
