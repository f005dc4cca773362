"""Evaluation hooks and logging: intervals, metrics and resume."""

import itertools
import json
import math
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from one_device import one_device  # noqa: F401
from process_harness import assert_alike, at, run_attempt, send
from small_text import flags_of_sheep

import tjx_ckpt
import tjx_metrics
import tjx_metrics.trackers.registry
import tjx_nn
from tjx_core import ConfigError
from tjx_trainer import main as program
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.training.build import Job, build_job
from tjx_trainer.training.preflight import check_requirements
from tjx_trainer.training.step_timer import Elapsed, StepTimer, model_flops

TINY = """
--model.n_layer=2 --model.n_head=2 --model.d_model=16 --model.max_seq_len=16 --data.seq_len=16
--data.tokenizer=char --data.holdout=tail --train.max_steps=12 --train.batch_size=8
--train.eval_every=6 --train.eval_tokens=300 --train.sample_tokens=6 --log.every=4
--optimizer.learning_rate=1e-2 --schedule.warmup_steps=2 --checkpoint.every=5
--log.layer_norms_every=3 --log.histograms_every=4 --log.samples_every=5 --log.accuracies=true
--profile.steps=7-8
""".split()  # noqa: SIM905  a list of words reads worse


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*TINY, *flags_of_sheep(tmp_path_factory.mktemp("data"))]


@pytest.fixture(scope="module")
def job(words: list[str]) -> Job:
    return build_job(*open_task(resolve(words)))


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert run_attempt(job, path) == 0
    return path


def steps_with(path: Path, prefix: str) -> list[int]:
    found = tjx_metrics.read_metrics(path / "metrics.jsonl")
    return [line["step"] for line in found if any(name.startswith(prefix) for name in line)]


def test_each_look_is_taken_at_its_own_steps(job: Job, whole: Path) -> None:
    assert steps_with(whole, "train/loss") == [1, 4, 8, 12]
    assert steps_with(whole, "norms/") == [3, 6, 9, 12]
    assert steps_with(whole, "histograms/") == [4, 8, 12]
    assert steps_with(whole, "samples/") == [5, 10]
    assert steps_with(whole, "eval/top5_accuracy") == [0, 6, 12]

    last = [
        line for line in tjx_metrics.read_metrics(whole / "metrics.jsonl") if line["step"] == 12
    ]
    spread = next(line for line in last if any(n.startswith("histograms/") for n in line))
    with tjx_ckpt.Checkpointer(whole / "checkpoints") as checkpointer:
        params = jax.device_get(checkpointer.restore(job.abstract, step=12).params)
    up = spread["histograms/parameter/blocks/mlp/up/kernel/1"]
    kernel = params["blocks"]["mlp"]["up"]["kernel"][1]
    np.testing.assert_allclose(up["edges"][0], kernel.min(), rtol=1e-6)
    assert sum(up["counts"]) == kernel.size
    # The norm of all parameters is made of those of the layers.
    norms = next(line for line in last if any(n.startswith("norms/") for n in line))
    parts = [v for n, v in norms.items() if n.startswith("norms/parameter/")]
    assert norms["train/param_norm"] == pytest.approx(math.hypot(*parts), rel=1e-5)


def test_a_resumed_run_reports_the_same_summary(job: Job, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    # In the midst of the evaluation of step 6, and before the sample of step 10.
    with at("evaluate", 6, send(signal.SIGTERM), nth=2):
        assert run_attempt(job, path) == 143
    with at("train", 9, send(signal.SIGTERM)):
        assert run_attempt(job, path) == 143
    assert run_attempt(job, path) == 0
    assert_alike(job, path, whole)
    found = tjx_metrics.read_metrics(path / "metrics.jsonl")
    counts = [(line["step"], line["train/tokens"]) for line in found if "train/tokens" in line]
    assert counts == [(step, step * 8 * 16) for step in (1, 4, 8, 12)]
    hours = [line["train/hours"] for line in found if "train/hours" in line]
    assert hours == sorted(hours)


def test_the_times_of_a_record_are_all_the_time_since_the_one_before(whole: Path) -> None:
    found = [x for x in tjx_metrics.read_metrics(whole / "metrics.jsonl") if "train/hours" in x]
    for before, line in itertools.pairwise(found):
        spent = math.fsum(value for name, value in line.items() if name.startswith("time/"))
        passed = 3600 * (line["train/hours"] - before["train/hours"])
        assert spent == pytest.approx(passed, abs=0.02)  # one is read after the other
    assert found[1]["time/evaluation"] == 0
    assert found[2]["time/evaluation"] > 0
    assert found[-1]["memory/host_peak_bytes"] > 2**20
    assert found[-1]["compile/count"] >= 3


def test_the_selected_steps_are_profiled_and_reported(whole: Path) -> None:
    report = (whole / "profile" / "report.txt").read_text()
    for kind in ("matmul", "attention", "optimizer", "loss", "communication"):
        assert kind in report
    assert all(len(line) <= 80 for line in report.splitlines())
    content = json.loads((whole / "profile" / "report.json").read_text())
    assert len(content["operations"]) == 30
    assert content["operations"][0]["share"] == max(x["share"] for x in content["operations"])
    assert math.fsum(content["shares"].values()) == pytest.approx(1)
    (trace,) = whole.glob("profile/**/*.xplane.pb")
    with warnings.catch_warnings():
        # jaxlib's own types give one when they are first looked at, and abort where it is raised.
        warnings.simplefilter("ignore", DeprecationWarning)
        steps = {
            dict(event.stats)["step_num"]
            for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
            for line in plane.lines
            for event in line.events
            if event.name == "step"
        }
    assert steps == {7, 8}


def test_settings_and_results_are_written_beside(job: Job, whole: Path) -> None:
    settings = json.loads((whole / "metrics.hyperparameters.json").read_text())
    assert settings["model.n_layer"] == 2
    assert settings["parameters"] == tjx_nn.count_params(job.config.model)
    assert settings["versions"]["jax"] == jax.__version__
    results = json.loads((whole / "metrics.summary.json").read_text())
    losses = [
        line["eval/loss"]
        for line in tjx_metrics.read_metrics(whole / "metrics.jsonl")
        if "eval/loss" in line
    ]
    assert results["eval/loss"] == losses[-1]
    assert results["eval/best_loss"] == min(losses)
    assert results["tokens"] == 12 * 8 * 16
    assert sum(value for name, value in results.items() if name.startswith("time/")) == (
        pytest.approx(1)
    )


def test_mfu_is_flops_of_the_model_by_those_of_all_devices(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        "train/mfu"
        not in StepTimer(job.config, job.mesh, start_step=0, elapsed=Elapsed()).figures()
    )
    monkeypatch.setattr(tjx_metrics, "peak_flops", lambda *_: 1e9)
    step_timer = StepTimer(job.config, job.mesh, start_step=0, elapsed=Elapsed())
    rates: Any = SimpleNamespace(tokens_per_sec=512.0, steps_per_sec=4.0)
    monkeypatch.setattr(step_timer, "throughput", rates)
    expected = 4 * model_flops(job.config) / (1e9 * job.mesh.size)
    assert step_timer.figures()["train/mfu"] == pytest.approx(expected)


class Blocked:
    """A tracker that takes its first record and never comes back."""

    def __init__(self, came: threading.Event) -> None:
        self.came, self.never = came, threading.Event()

    def log_hyperparameters(self, hyperparameters: Any) -> None:
        self.came.set()
        self.never.wait()


def killed(came: threading.Event) -> Any:
    came.set()
    raise ConnectionResetError("the service is gone")


@pytest.mark.parametrize("make", [Blocked, killed])
def test_a_tracker_that_is_blocked_or_killed_costs_the_run_nothing(
    job: Job, whole: Path, tmp_path: Path, make: Callable[[threading.Event], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    came = threading.Event()

    def open_trackers(*_: Any, **__: Any) -> list[tjx_metrics.Tracker]:
        one = tjx_metrics.BackgroundTracker(lambda _: make(came), "wandb", finish_seconds=0.2)
        return [one]

    monkeypatch.setattr(tjx_metrics, "open_trackers", open_trackers)
    path = tmp_path / "run"
    with pytest.warns(tjx_metrics.TrackerWarning, match="tracker wandb: "):
        assert run_attempt(job, path) == 0
    assert came.is_set()
    assert_alike(job, path, whole)


def test_a_tracker_without_its_library_is_rejected_before_the_run(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'tjx-metrics\[wandb\]'"):
        check_requirements(resolve([*words, "--log.trackers=wandb"]))


def test_a_dry_run_reports_the_run_and_writes_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    given = [*words, f"--run_dir={path}"]
    assert program.main([*given, "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert not path.exists()
    for line in (
        "12 steps, 1.54k tokens",
        "128 tokens in 1 microbatch",
        "one every 5 steps",
        "It fits.",
    ):
        assert line in told
    assert "activations and other temporaries" in told
    # Mistakes are reported as by the run itself.
    with pytest.raises(SystemExit):
        program.main([*given, "--dry_run", "--mesh.data=3"])
