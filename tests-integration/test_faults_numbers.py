"""Non-finite numbers in real runs: skipped steps, rollback, and the fp16 loss scale."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from campaigns.outcome import Outcome, describe_difference, numbers, outcome
from campaigns.tiny_run import TinyRun

pytest_plugins = ["fault_fixtures"]

NOT_FINITE = 3

NewRun = Callable[..., TinyRun]


def records(run: TinyRun) -> list[dict[str, Any]]:
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_step_with_nan_gradients_is_skipped_and_counted(
    new_compiled_run: NewRun, expected_compiled: Outcome
) -> None:
    run = new_compiled_run()
    run.with_fault("nan_gradient", 12).finish()
    found = {record["step"]: record for record in records(run) if "train/loss" in record}
    assert [found[step]["train/skipped"] for step in (11, 12, 13, 60)] == [0, 1, 1, 1]
    # The loss of the step was finite, and earlier losses equal those of a run without the fault.
    for step in range(1, 13):
        loss = float(expected_compiled.numbers[step, "train/loss"])
        # The faulty step is a different program: the last bit may differ.
        assert found[step]["train/loss"] == pytest.approx(loss, rel=1e-6)
    # Step 12 changed nothing: with a NaN in the state all later losses would be NaN.
    assert all(found[step]["train/loss"] < 5 for step in range(13, 61))


def test_repeated_non_finite_steps_roll_back_once_and_match_the_undisturbed_run(
    new_compiled_run: NewRun, expected_compiled: Outcome
) -> None:
    run = new_compiled_run(guard_max_skipped=4)
    # The checkpoint of step 20 is intact on disk but has the damaged state.
    printed = run.with_fault("nan_parameter", 18).finish()
    assert "10" in printed
    assert describe_difference(outcome(run.run_dir), expected_compiled) == []


def test_run_stops_if_the_rollback_does_not_help(new_compiled_run: NewRun) -> None:
    run = new_compiled_run(guard_max_skipped=4)
    printed = run.with_fault("nan_parameter_again", 18).finish(expected=NOT_FINITE)
    assert "Traceback" not in printed
    assert "learning_rate" in printed  # the suggested remedy
    # Each step is recorded once, including repeated ones.
    assert max(step for step, _ in numbers(run.run_dir)) >= 18


def test_fp16_overflow_halves_the_loss_scale_which_is_resumed(new_compiled_run: NewRun) -> None:
    flags: dict[str, Any] = {
        "train_precision": "fp16", "guard_initial_scale": 2.0**24, "guard_growth_interval": 8,
    }  # fmt: skip
    whole = new_compiled_run("whole", **flags)
    whole.finish()
    scales = [record["train/loss_scale"] for record in records(whole) if "train/loss" in record]
    skipped = [record["train/skipped"] for record in records(whole) if "train/loss" in record]
    assert scales[0] == 2.0**24
    changes = {after / before for before, after in itertools.pairwise(scales)}
    assert changes == {0.5, 1.0, 2.0}
    assert skipped[-1] >= 1

    parts = new_compiled_run("parts", **flags)
    life = parts.with_fault("gates", 15).start()
    life.wait_until(lambda: parts.saved() == [10] and parts.at_gate(15), "the gate")
    life.kill()
    parts.finish()
    assert describe_difference(outcome(parts.run_dir), outcome(whole.run_dir)) == []
