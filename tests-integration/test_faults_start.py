"""Errors before the first step: invalid configuration, changed data, a run directory in use."""

import os
from collections.abc import Callable
from dataclasses import replace

from campaigns.outcome import Outcome, describe_difference, outcome
from campaigns.tiny_run import TinyRun, write_text

pytest_plugins = ["fault_fixtures"]

NewRun = Callable[..., TinyRun]

USER_ERROR = 2


def test_all_configuration_problems_are_reported_before_jax_is_imported(
    new_compiled_run: NewRun,
) -> None:
    run = new_compiled_run(
        train_max_step=5, train_batch_size=9, model_n_head="three", schedule_name="cosin",
        optimizer_learning_rate=-1,
    )  # fmt: skip
    alone = replace(run, server=None)  # a forked process has imported JAX already
    printed = alone.finish(expected=USER_ERROR, PYTHONPROFILEIMPORTTIME="1")
    errors = "\n".join(line for line in printed.splitlines() if "import time:" not in line)
    for name in (
        "train.max_step", "batch_size", "model.n_head", "schedule.name", "learning_rate",
    ):  # fmt: skip
        assert name in errors
    assert "Traceback" not in errors
    imported = {line.split("|")[-1].strip() for line in printed.splitlines() if "|" in line}
    assert "json" in imported, "imports were to be printed"
    assert not {"jax", "numpy", "tjx_trainer.training.train"} & imported
    assert not run.run_dir.exists()


def test_resuming_with_other_data_is_rejected(copy_of_finished: Callable[..., TinyRun]) -> None:
    run = copy_of_finished()
    other = run.folder / "other.txt"
    write_text(other, lines=401)
    before = sorted(run.run_dir.rglob("*"))
    changed = run.elsewhere(run.folder, data_path=str(other), train_max_steps=70)
    changed_in_place = run.elsewhere(run.folder, data_path=str(other))
    for each in (changed, changed_in_place):
        printed = each.finish(expected=USER_ERROR)
        assert "Traceback" not in printed
        assert "data" in printed
    assert sorted(run.run_dir.rglob("*")) == before


def test_restart_of_a_finished_run_does_nothing(
    copy_of_finished: Callable[..., TinyRun], expected: Outcome
) -> None:
    run = copy_of_finished()
    run.finish()
    assert describe_difference(outcome(run.run_dir), expected) == []


def test_second_run_in_the_same_directory_is_rejected_without_harm(
    new_run: NewRun, expected: Outcome
) -> None:
    run = new_run()
    first = run.with_fault("gates", 15).start()
    first.wait_until(lambda: run.at_gate(15), "the gate")
    printed = run.finish(expected=USER_ERROR)
    assert f"process {first.process.pid} on" in printed
    assert "Traceback" not in printed
    run.open_gates(15, 25, 35, 45, 55)
    assert first.wait() == 0
    assert describe_difference(outcome(run.run_dir), expected) == []


def test_clock_jumps_change_nothing(new_run: NewRun, expected: Outcome) -> None:
    run = new_run()
    life = run.with_fault("clock", 15).with_fault("gates", 35).start()  # back by a day
    life.wait_until(lambda: run.saved() == [10, 20, 30], "step 30")
    life.kill()
    # And the oldest checkpoint has the newest time.
    for age, step in enumerate(run.saved()):
        for path in [*(run.checkpoints / str(step)).rglob("*"), run.checkpoints / str(step)]:
            os.utime(path, (2e9 - 1e8 * age, 2e9 - 1e8 * age))
    assert "from step 30" in run.finish()
    assert describe_difference(outcome(run.run_dir), expected) == []
