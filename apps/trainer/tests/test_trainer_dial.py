"""The dial: one number sets a run by rules, flags override it, and the run records the values."""

import math
from pathlib import Path

import pytest

from tjx_core import ConfigError
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.config.config_compat import incompatible_changes
from tjx_trainer.config.config_tree import flatten
from tjx_trainer.runtime.run_dir import to_yaml
from tjx_trainer.scaling.dial import RULES, describe_dial


def test_the_dial_sets_every_value_by_its_rule() -> None:
    """The values at depth 12, the shape of GPT-2 small, computed by hand."""
    config = resolve(["--config", "gpt2_small", "--scale.depth", "12"])
    model, optimizer = config.model, config.optimizer
    assert (model.n_layer, model.d_model, model.n_head, model.head_dim) == (12, 768, 12, 64)
    assert (model.width_multiplier, model.depth_multiplier) == (3, 3)
    tokens = 20 * 84_934_656
    batch = 2048 * 0.0306 * tokens**0.383  # 213,900 tokens
    assert config.train.batch_size == 208  # of 1024 tokens; the nearest multiple of 8
    assert config.train.max_steps == round(tokens / (208 * 1024))
    assert math.isclose(optimizer.learning_rate, 4e-3 * (208 * 1024 / batch) ** 0.5, rel_tol=1e-3)
    # Steps that AdamW averages over, as a fraction of the run.
    assert optimizer.weight_decay is not None
    timescale = 1 / (optimizer.learning_rate * optimizer.weight_decay * config.train.max_steps)
    assert math.isclose(timescale, 1.084 * 20**-0.527, rel_tol=1e-3)
    assert (config.schedule.name, config.schedule.final_fraction) == ("linear", 0)
    assert config.schedule.in_steps(1000).warmup == 100


def test_a_flag_wins_and_the_rest_follows() -> None:
    config = resolve([
        "--scale.depth=2", "--model.d_model=96", "--train.batch_size=16", "--data.seq_len=64",
        "--schedule.warmup_steps=5",
    ])  # fmt: skip
    params = 12 * 2 * 96**2
    assert (config.model.d_model, config.model.n_head) == (96, 1)
    assert config.train.max_steps == round(20 * params / (16 * 64))
    best = 20 * params / 1000
    assert math.isclose(
        config.optimizer.learning_rate, 4e-3 * (16 * 64 / best) ** 0.5, rel_tol=1e-3
    )
    assert config.schedule.warmup_fraction is None
    table = "\n".join(describe_dial(config))
    assert "model.d_model             96        given; rule: 128: scale.width_per_layer" in table
    assert table.count("given") == 3


@pytest.mark.parametrize("flops", [1e12, 1e15, 3e18])
def test_flops_are_spent(flops: float) -> None:
    config = resolve([f"--scale.flops={flops}", "--config", "gpt2_small"])
    params = 12 * config.model.n_layer * config.model.d_model**2
    tokens = config.train.max_steps * config.train.batch_size * config.data.seq_len
    assert math.isclose(6 * params * tokens, flops, rel_tol=0.02)
    # A depth more or less is farther from 20 tokens per parameter.
    assert 20 / 3.5 < tokens / params < 20 * 3.5 or config.model.n_layer == 1


def test_the_run_records_the_values(tmp_path: Path) -> None:
    config = resolve(["--scale.depth=3", "--train.batch_size=8", "--optimizer.b2=0.98"])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    again = resolve(["--config", str(saved)])
    assert flatten(again) == flatten(config)
    # Recorded values count as given; a dial that is turned anew overrides them.
    deeper = resolve(["--config", str(saved), "--scale.depth=4", "--train.batch_size=8"])
    direct = resolve(["--scale.depth=4", "--train.batch_size=8", "--optimizer.b2=0.98"])
    assert flatten(deeper) == flatten(direct)


def test_a_preset_can_turn_the_dial(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("scale: {depth: 2}\ntrain: {batch_size: 4}\n")
    config = resolve(["--config", str(preset), "--model.n_layer=3"])
    assert (config.model.n_layer, config.model.d_model) == (3, 192)
    assert config.train.batch_size == 4


def test_a_resumed_run_may_leave_the_dial_out(tmp_path: Path) -> None:
    dialed = resolve(["--scale.depth=1"])
    words = [f"--{rule.name}={flatten(dialed)[rule.name]}" for rule in RULES]
    by_hand = resolve([word for word in words if not word.endswith("=None")])
    assert incompatible_changes(dialed, by_hand, steps_done=0) == []


def test_without_the_dial_nothing_changes() -> None:
    assert resolve(["--scale.width_per_layer=32"]).model == resolve([]).model
    assert describe_dial(resolve([])) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scale.depth=0"], "scale.depth: got 0; expected 1 to 1000; try 4"),
        (["--scale.depth=2", "--scale.flops=1e12"], "scale.flops: got 1e+12 with depth 2; expec"),
        (["--scale.flops=-1"], "scale.flops: got -1.0; expected a number above 0, such as 1e+15"),
        (["--scale.depth=2", "--scale.head_size=3"], "scale.head_size: got 3; expected an even"),
        (["--config=vit_mnist", "--scale.depth=2"], "scale.depth: got 2 with model.family vit; e"),
        (["--scale.depth=2", "--optimizer.name=muon"], "model.mup_base: got 256 with optimizer.na"),
        (["--scale.depth=2", "--train.batch_size=0"], "train.batch_size: got 0; expected at least"),
        (["--scale.deep=2"], "--scale.deep: unknown flag; did you mean --scale.depth?"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(words)
    assert any(str(problem).startswith(said) for problem in caught.value.problems), caught.value
