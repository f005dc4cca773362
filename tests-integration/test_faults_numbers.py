"""Numbers that are not finite, in real runs: skipped, counted, gone back from; fp16's scale."""

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


def test_a_step_whose_gradients_hold_a_nan_is_skipped_and_counted(
    new_run: NewRun, expected: Outcome
) -> None:
    run = new_run()
    run.with_fault("nan_gradient", 12).finish()
    found = {record["step"]: record for record in records(run) if "train/loss" in record}
    assert [found[step]["train/skipped"] for step in (11, 12, 13, 60)] == [0, 1, 1, 1]
    # The loss of the step was sound, and those before are those of a run without the fault.
    for step in range(1, 13):
        loss = float(expected.numbers[step, "train/loss"])
        # The faulty step is another program: the last bit may differ.
        assert found[step]["train/loss"] == pytest.approx(loss, rel=1e-6)
    # Nothing was learnt at step 12: no NaN came into the state, or all losses were NaN from here.
    assert all(found[step]["train/loss"] < 5 for step in range(13, 61))


def test_after_many_in_a_row_the_run_goes_back_once_and_ends_as_if_undisturbed(
    new_run: NewRun, expected: Outcome
) -> None:
    run = new_run(guard_max_skipped=4)
    # Step 20 was saved with the damage in it: it is sound on the disk and useless.
    printed = run.with_fault("nan_parameter", 18).finish()
    assert "10" in printed
    assert describe_difference(outcome(run.run_dir), expected) == []


def test_where_going_back_does_not_help_the_run_stops(new_run: NewRun) -> None:
    run = new_run(guard_max_skipped=4)
    printed = run.with_fault("nan_parameter_again", 18).finish(expected=NOT_FINITE)
    assert "Traceback" not in printed
    assert "learning_rate" in printed  # what to try
    # Each step is recorded once, also those that were made twice.
    assert max(step for step, _ in numbers(run.run_dir)) >= 18


def test_an_overflow_of_fp16_halves_the_scale_which_goes_on_with_the_run(new_run: NewRun) -> None:
    flags: dict[str, Any] = {
        "train_precision": "fp16", "guard_initial_scale": 2.0**24, "guard_growth_interval": 8,
    }  # fmt: skip
    whole = new_run("whole", **flags)
    whole.finish()
    scales = [record["train/loss_scale"] for record in records(whole) if "train/loss" in record]
    skipped = [record["train/skipped"] for record in records(whole) if "train/loss" in record]
    assert scales[0] == 2.0**24
    changes = {after / before for before, after in itertools.pairwise(scales)}
    assert changes == {0.5, 1.0, 2.0}
    assert skipped[-1] >= 1

    parts = new_run("parts", **flags)
    life = parts.with_fault("gates", 15).start()
    life.wait_until(lambda: parts.saved() == [10] and parts.reached(13), "step 13")
    life.kill()
    parts.finish()
    assert describe_difference(outcome(parts.run_dir), outcome(whole.run_dir)) == []
