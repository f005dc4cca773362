"""Phases: other batch sizes, lengths, windows and logit caps from given steps on."""

import signal
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from one_device import one_device  # noqa: F401
from process_harness import assert_alike, at, final_state, records, run_attempt, send, steps
from small_text import flags_of_sheep

import tjx_metrics
from tjx_core import ConfigError
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.planning.dry_run import print_dry_run
from tjx_trainer.runtime.memory_report import measure
from tjx_trainer.training.build import Job
from tjx_trainer.training.train import prepare

TINY = """
--model.n_layer=1 --model.n_head=2 --model.d_model=16 --model.max_seq_len=16 --data.seq_len=16
--data.tokenizer=char --data.holdout=tail --train.max_steps=12 --train.batch_size=8
--train.eval_every=12 --train.eval_tokens=300 --train.sample_tokens=0 --log.every=1
--schedule.warmup_steps=2 --model.positions=rope
""".split()  # noqa: SIM905  a list of words reads worse
PHASES = "0:train.batch_size=4; 4:model.window=4,model.logit_soft_cap=5; 8:data.seq_len=8"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*TINY, *flags_of_sheep(tmp_path_factory.mktemp("data"))]


@pytest.fixture(scope="module")
def job(words: Sequence[str]) -> Job:
    return prepare(resolve([*words, f"--train.phases={PHASES}"]))


def finish(job: Job, path: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tjx_metrics, "plot_loss", lambda *_: None)
        assert run_attempt(job, path) == 0
    return path


def test_each_phase_continues_the_data_of_the_phase_before(words: Sequence[str], job: Job) -> None:
    plain = prepare(resolve(words)).task.train_data
    found = [job.at(step).rows(step)["tokens"] for step in range(12)]
    assert [rows.shape for rows in found] == [(4, 16)] * 4 + [(8, 16)] * 4 + [(8, 8)] * 4
    # Half batches take two steps for what a batch of the run has.
    expected = np.concatenate([plain.batch(step)["tokens"] for step in range(6)])
    np.testing.assert_array_equal(np.concatenate(found[:8]), expected)
    # 6 batches of 8 rows of 16 tokens are 12 of 8 rows of 8 tokens.
    short = job.at(8).task.train_data.batch(12)["tokens"]
    np.testing.assert_array_equal(found[8], short)


def test_the_steps_of_a_phase_are_those_of_a_run_with_its_values(
    words: Sequence[str], job: Job
) -> None:
    values = ["--model.window=4", "--model.logit_soft_cap=5"]
    losses = []
    for each in (job.at(4), prepare(resolve([*words, *values])), job):
        batch = each.put(job.at(4).rows(4))
        losses.append(
            float(jax.device_get(each.train_step(each.initial_state(), batch)[1])["loss"])
        )
    assert losses[0] == losses[1] != losses[2]


def test_a_run_that_stops_in_a_phase_resumes_with_the_same_bits(job: Job, tmp_path: Path) -> None:
    whole = finish(job, tmp_path / "whole")
    parted = tmp_path / "parted"
    with at("train from step 4", 6, send(signal.SIGTERM)):
        assert run_attempt(job, parted) == 128 + signal.SIGTERM
    assert steps(parted) == [7]
    assert_alike(job, finish(job, parted), whole)
    counts = [line["train/tokens"] for line in records(whole) if "train/tokens" in line]
    assert np.diff([0, *counts]).tolist() == [64] * 4 + [128] * 4 + [64] * 4


def test_a_phase_with_the_values_of_the_run_changes_no_bit(
    words: Sequence[str], tmp_path: Path
) -> None:
    paths = []
    for name, flags in (("plain", []), ("same", ["--train.phases=3:train.batch_size=8"])):
        job = prepare(resolve([*words, *flags]))
        paths.append(finish(job, tmp_path / name))
    plain, same = (final_state(job, path) for path in paths)
    assert plain == same


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--train.phases=0:data.seq_length=8"], "got data.seq_length; .* mean data.seq_len?"),
        (["--train.phases=0:optimizer.b1=0.5"], "got optimizer.b1; expected one of train.batch"),
        (["--train.phases=0:data.seq_len"], "got '0:data.seq_len'; expected STEP:NAME=VALUE"),
        (["--train.phases=4:data.seq_len=8;4:data.seq_len=16"], "got step 4 after 4; expected asc"),
        (["--train.phases=12:data.seq_len=8"], "got step 12; expected less than max_steps=12"),
        (["--train.phases=0:data.seq_len=none"], "got data.seq_len=none; expected a whole number$"),
        (["--train.phases=0:model.window=x"], "got model.window=x; expected a whole number, or no"),
        (["--train.phases=0:data.seq_len=32"], "from step 0: data.seq_len: got 32; expected at mo"),
        (["--train.phases=0:data.seq_len=8", "--task=dpo", "--train.init_from=x"], "with task dpo"),
        (["--train.phases=0:data.seq_len=8", "--scale.depth=1"], "with the dial"),
        (["--train.phases=0:data.seq_len=8", "--distill.teacher=x"], "with distill.teacher"),
        (
            [
                "--train.phases=0:data.seq_len=8",
                "--data.mixture=x.txt=1,y.txt=1",
                "--data.curriculum=5:x.txt=1",
            ],
            "with data.curriculum",
        ),
    ],
)
def test_mistakes_are_named(flags: Sequence[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve([*TINY, *flags])


def test_a_dry_run_counts_the_tokens_of_the_phases_and_the_memory_of_the_largest(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [n for n, _ in job.segments()] == [4, 4, 4]
    assert print_dry_run(job) == 0
    assert "12 steps, 1.02k tokens\n" in capsys.readouterr().out
    largest = max(measure(each).total for each in (job.at(0), job.at(4), job.at(8)))
    assert measure(job).total == largest > measure(job.at(0)).total
