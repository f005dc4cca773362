"""Experiment pages: claims, text and results, with tiny runs."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from experiments import arms, command, predictions, tuning
from experiments.page import Claim, Page, table, to_markdown
from experiments.runs import Outcome, Run, RunFailedError, read_journal, run_all, run_one

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "experiments"
NAMES = (
    "ablation", "accumulation", "gradient_explosion", "mixtures", "optimizers", "positions",
    "precision", "predictions", "rate_transfer", "recipe", "schedules", "vocabulary_size",
)  # fmt: skip
TEXT = "the wall is high and the wall is long\n" * 200


def outcome(arm: str, seed: int, loss: float, rate: float = 1.0, exit_code: int = 0) -> Outcome:
    return Outcome(
        arm=arm, seed=seed, flags={tuning.RATE: rate}, exit_code=exit_code, seconds=1.0,
        curves={"eval/loss": [(0, 9.0), (10, loss)]},
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_page_names_its_command_and_matches_its_json(name: str) -> None:
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    assert experiment.name == name
    text = (PAGES / f"{name}.md").read_text()
    given = "" if experiment.text_flag is None else " -- --data.path 'books/*.txt'"
    assert f"    ./pants run tools/experiments/{name}.py{given}\n" in text
    assert (PAGES / f"{name}.png").stat().st_size > 10_000
    results = command.read_json(PAGES / f"{name}.json")
    assert to_markdown(experiment.page(results), name, results["about"]) == text
    assert f"[{name}]({name}.md)" in (PAGES / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smoke_run_writes_page_and_figure(name: str, tmp_path: Path) -> None:
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    words = ["--smoke", "--seeds", "2", "--output", str(tmp_path)]
    if experiment.text_flag is not None:
        text = tmp_path / "text.txt"
        text.write_text((ROOT / "LICENSE").read_text() * 4)
        words += [experiment.text_flag, str(text)]
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *words],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "## Claims" in (tmp_path / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_claim_holds_only_if_every_seed_supports_it() -> None:
    assert arms.lower("A is lower.", [1.0, 2.0], [1.1, 2.1]).holds
    assert not arms.lower("A is lower.", [1.0, 2.0], [1.1, 1.9]).holds
    # A diverged run is no evidence for either side.
    assert not arms.lower("A is lower.", [1.0, 2.0], [1.1, math.nan]).holds
    assert not arms.lower("A is lower.", [1.0, math.nan], [1.1, 2.1]).holds


def test_failed_claim_is_printed_as_failed() -> None:
    claims = [
        Claim(text="Up.", holds=True, figures="1"),
        Claim(text="Down.", holds=False, figures="2"),
    ]
    page = Page(
        title="T", question="Q?", setup="S.", columns=["a", "b"], rows=[["x", "1"]],
        table_note="N.", picture="P.", claims=claims, conclusions=["C."], limits=["L."],
    )  # fmt: skip
    about = {"command": "run it", "date": "d", "seconds": 90, "machine": "m", "versions": "v"}
    text = to_markdown(page, "name", about)
    assert "- Up. **Holds**: 1." in text
    assert "- Down. **Does not hold in this run**: 2." in text
    assert "    run it\n" in text
    assert "(name.png)" in text
    assert "1.5 minutes" in text
    with pytest.raises(AssertionError, match="lacks a cell"):
        table(["a", "b"], [["x"]])


def test_non_finite_results_survive_strict_json(tmp_path: Path) -> None:
    written = {"name": "x", "runs": [{"loss": [math.nan, math.inf, 1 / 3]}, {"loss": []}]}
    command.write_json(tmp_path / "r.json", written)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    nan, inf, third = command.read_json(tmp_path / "r.json")["runs"][0]["loss"]
    assert math.isnan(nan)
    assert (inf, third) == (math.inf, 0.333333)


def test_best_rate_has_the_best_mean_over_finished_seeds() -> None:
    sweep = [
        outcome("a", 0, 1.0, rate=0.1, exit_code=3),
        outcome("a", 1, 1.0, rate=0.1),
        outcome("a", 0, 3.0, rate=0.2),
        outcome("a", 1, 1.1, rate=0.2),  # an outlier
        outcome("a", 0, 2.0, rate=0.3),
        outcome("a", 1, 2.0, rate=0.3),
        outcome("a", 0, math.nan, rate=0.4),
    ]
    assert tuning.best_rate(sweep) == 0.3
    assert tuning.loss_by_rate(sweep)[0.2] == pytest.approx(2.05)
    results = {"best": {"a": 0.3}, "sweep": [each.as_json() for each in sweep]}
    assert tuning.tuned_inside(results).holds
    assert not tuning.tuned_inside({**results, "best": {"a": 0.4}}).holds


def test_arms_that_are_not_tuned_are_named() -> None:
    best = {"inside": 0.2, "end": 0.3, "wide": 0.2}
    sweep = [outcome(arm, 0, 1.0, rate).as_json() for arm in best for rate in (0.1, 0.2, 0.3)]
    runs = [
        outcome(arm, seed, 1.0 + seed * (0.5 if arm == "wide" else 0.05)).as_json()
        for arm in best
        for seed in (2, 3)
    ]
    results = {"best": best, "sweep": sweep, "runs": runs}
    assert "not to be ranked: end, wide." in tuning.not_tuned(results)
    assert not tuning.stable(results).holds
    only = {"best": {"inside": 0.2}, "sweep": sweep[:3], "runs": runs[:2]}
    assert tuning.not_tuned(only).startswith("Every arm is tuned")
    assert tuning.stable(only).holds


def test_curve_is_a_mean_over_common_steps() -> None:
    short = Outcome(
        arm="a", seed=1, flags={}, exit_code=3, seconds=1.0, curves={"eval/loss": [(0, 7.0)]}
    )
    steps, mean, spread = arms.curve([outcome("a", 0, 2.0), short], "eval/loss")
    assert (steps.tolist(), mean.tolist()) == ([0], [8.0])
    assert spread.tolist() == pytest.approx([math.sqrt(2)])


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text(TEXT)
    return {
        "data.path": str(tmp_path / "text.txt"), "data.tokenizer": "char", "data.holdout": "tail",
        "data.cache_dir": str(tmp_path / "cache"), "data.seq_len": 8,
        "model.n_layer": 1, "model.n_head": 1, "model.d_model": 8, "model.max_seq_len": 8,
        "train.max_steps": 2, "train.batch_size": 8, "train.sample_tokens": 0, "log.every": 1,
    }  # fmt: skip


def test_run_returns_the_curves_of_the_trainer(tiny: dict[str, Any]) -> None:
    with jax.transfer_guard("allow"):
        found = run_one(Run(arm="a", flags=tiny, seed=3, after=lambda run: {"name": run.name}))
    assert (found.exit_code, found.extra) == (0, {"name": "run"})
    assert [step for step, _ in found.curves["train/loss"]] == [1, 2]
    assert found.final_loss == found.curves["eval/loss"][-1][1]
    assert found.final_loss < math.log(128)


def test_journal_saves_finished_runs(tiny: dict[str, Any], tmp_path: Path) -> None:
    runs = [Run(arm="a", flags=tiny, seed=seed) for seed in (0, 1)]
    done = [
        Outcome(arm="a", seed=seed, flags=tiny, exit_code=0, curves={}, seconds=1.0)
        for seed in (0, 1)
    ]
    journal = tmp_path / "x.runs.jsonl"
    assert read_journal(journal, runs) == {}
    journal.write_text("".join(json.dumps(each.as_json()) + "\n" for each in done))
    assert run_all(runs, journal=journal) == done  # without a run of the trainer
    with journal.open("a") as file:
        file.write('{"arm": "a", "se')  # killed while it wrote
    other = Run(arm="a", flags={**tiny, "data.seq_len": 4}, seed=0)
    assert read_journal(journal, [runs[1], other]) == {0: done[1]}


def test_predictions_stay_as_written_when_the_large_runs_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_all(runs: list[Run], *, journal: Path) -> list[Outcome]:
        assert journal.name == "journal"
        return [
            Outcome(
                arm=run.arm, seed=run.seed, flags=run.flags, exit_code=0, seconds=1.0,
                curves={"eval/loss": [(1, 1.2 + float(run.flags["model.d_model"]) ** -0.6)]},
            )
            for run in runs
        ]  # fmt: skip

    monkeypatch.setattr(predictions, "run_all", run_all)
    monkeypatch.setattr(predictions, "CASES", {"characters": {}})
    options = command.Options(
        seeds=1, smoke=False, data={"data.path": "x.txt"}, journal=tmp_path / "journal",
        file=tmp_path / "predictions.json",
    )  # fmt: skip
    written = predictions.measure(options)
    assert "have not been made yet" in " ".join(predictions.page(written).conclusions)
    assert [claim.holds for claim in predictions.page(written).claims] == [False, False]
    command.write_json(options.file, written)
    found = predictions.measure(options)
    stored = command.read_json(options.file)["predictions"]
    assert [{**each, "measured": None} for each in stored] == [
        {**each, "measured": None} for each in found["predictions"]
    ]
    assert [claim.holds for claim in predictions.page(found).claims] == [True, True]
    command.write_json(options.file, found)
    assert "measured" not in predictions.measure(options)["predictions"][0]


def test_p_value_is_that_of_the_sign_flip_test() -> None:
    less = [1.0] * 10
    assert arms.paired_p_value(less, [2.0] * 10) == 2**-10
    assert arms.paired_p_value([2.0] * 10, less) == 1.0
    rng = np.random.default_rng(0)
    more = less + rng.normal(0.3, 0.5, 10)
    drawn = rng.choice((-1, 1), (200_000, 10)) @ (more - less)
    share = (drawn >= (more - less).sum()).mean()
    assert arms.paired_p_value(less, more.tolist()) == pytest.approx(share, abs=2e-3)
    assert arms.paired_p_value(less, [math.nan] * 10) == 1.0


def test_invalid_flags_end_the_experiment(tiny: dict[str, Any]) -> None:
    with pytest.raises(RunFailedError, match="max_stepz"):
        run_one(Run(arm="a", flags={**tiny, "train.max_stepz": 2}, seed=0))
