"""Signals in every phase of a run: it saves, exits with its code, and resumes exactly."""

import signal
import time
from collections.abc import Callable

import pytest
from campaigns.outcome import Outcome, describe_difference, numbers, outcome
from campaigns.tiny_run import RunProcess, TinyRun

pytest_plugins = ["fault_fixtures"]

NewRun = Callable[..., TinyRun]

INTERRUPTED, TERMINATED = 130, 143


def wait_for_phase(life: RunProcess, run: TinyRun, phase: str, step: int) -> None:
    def there() -> bool:
        beat = run.heartbeat()
        return beat.get("phase") == phase and beat["step"] == step

    life.wait_until(there, f"phase {phase} after step {step}")


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=["term", "int"],
)
def test_signal_during_training_finishes_and_saves_the_step(
    new_run: NewRun, expected: Outcome, number: signal.Signals
) -> None:
    run = new_run()
    life = run.with_fault("gates", 15).start()
    life.wait_until(lambda: run.at_gate(15), "the gate")
    life.signal(number)
    run.open_gates(15)
    assert life.wait() == 128 + number
    assert run.saved() == [10, 15]
    assert "step 15" in life.printed
    assert "from step 15" in run.finish()
    assert describe_difference(outcome(run.run_dir), expected) == []


def test_stop_signal_ends_the_wait_for_a_batch(new_run: NewRun, expected: Outcome) -> None:
    run = new_run(watchdog_heartbeat_seconds=0.01)
    life = run.with_fault("hang", 15).start()
    wait_for_phase(life, run, "train", 14)
    life.signal(signal.SIGTERM)
    assert life.wait() == TERMINATED
    assert run.saved() == [10, 14]
    run.finish()
    assert describe_difference(outcome(run.run_dir), expected) == []


def test_signal_during_compilation_finishes_and_saves_the_step(
    new_compiled_run: NewRun, expected_compiled: Outcome
) -> None:
    run = new_compiled_run(watchdog_heartbeat_seconds=0.01)
    # Nothing is compiled yet, so that compilation takes seconds.
    life = run.start(JAX_ENABLE_COMPILATION_CACHE="false")
    wait_for_phase(life, run, "train", 0)
    life.signal(signal.SIGTERM)
    assert life.wait() == TERMINATED
    assert run.saved() == [1]
    run.finish()
    assert describe_difference(outcome(run.run_dir), expected_compiled) == []


def test_interrupted_evaluation_is_repeated_on_resume(new_run: NewRun, expected: Outcome) -> None:
    run = new_run(watchdog_heartbeat_seconds=0.01)
    life = run.with_fault("held_evaluation", 25).start()
    wait_for_phase(life, run, "evaluate", 25)
    life.signal(signal.SIGTERM)
    run.open_gates("evaluation")
    assert life.wait() == TERMINATED
    assert run.saved()[-1] == 25
    assert (25, "eval/loss") not in numbers(run.run_dir), "it was made to its end"
    run.finish()
    assert describe_difference(outcome(run.run_dir), expected) == []


def test_repeated_signals_during_saving_do_not_interrupt_it(
    new_run: NewRun, expected: Outcome
) -> None:
    run = new_run()
    life = run.with_fault("slow_disk", 8).start()
    life.wait_until(lambda: "10.tmp" in run.unfinished(), "a save")
    for _ in range(3):
        life.signal(signal.SIGTERM)
        time.sleep(0.05)  # simultaneous signals merge
    assert 10 not in run.saved(), "the save was to be under way"
    assert life.wait() == TERMINATED
    assert run.unfinished() == []
    assert run.saved()[0] == 10
    run.finish()
    assert describe_difference(outcome(run.run_dir), expected) == []


def test_second_interrupt_ends_the_run_at_once_without_damage(
    new_run: NewRun, expected: Outcome
) -> None:
    run = new_run()
    life = run.with_fault("slow_disk", 18).start()
    life.wait_until(lambda: "20.tmp" in run.unfinished(), "a save")
    for _ in range(2):
        life.signal(signal.SIGINT)
        time.sleep(0.05)
    assert life.wait() == INTERRUPTED
    assert "Traceback" not in life.printed
    assert 10 in run.saved()
    run.finish()
    assert describe_difference(outcome(run.run_dir), expected) == []


def test_save_signal_saves_and_the_run_continues(new_run: NewRun, expected: Outcome) -> None:
    run = new_run(checkpoint_every=1000)
    life = run.with_fault("gates", 15).start()
    life.wait_until(lambda: run.at_gate(15), "the gate")
    life.signal(signal.SIGUSR1)
    run.open_gates(15)
    life.wait_until(lambda: run.saved() == [15], "the requested checkpoint")
    run.open_gates(25, 35, 45, 55)
    assert life.wait() == 0
    assert run.saved() == [15, 60]
    found = outcome(run.run_dir)
    assert (found.leaves, found.numbers) == (expected.leaves, expected.numbers)
