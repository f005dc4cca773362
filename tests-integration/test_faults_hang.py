"""Hangs, out-of-memory, and restarts by the supervisor."""

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from campaigns.outcome import Outcome, describe_difference, outcome
from campaigns.tiny_run import TinyRun

pytest_plugins = ["fault_fixtures"]

NewRun = Callable[..., TinyRun]

HANG, OUT_OF_MEMORY = 6, 7


def test_hanging_run_dumps_its_stacks_and_ends(new_run: NewRun, expected: Outcome) -> None:
    run = new_run(watchdog_min_seconds=2)
    printed = run.with_fault("hang", 25).finish(expected=HANG)
    (report,) = run.run_dir.glob("hang-*.txt")
    assert report.name in {"hang-23.txt", "hang-24.txt"}
    for text in (printed, report.read_text()):
        assert "faulty_trainer.py" in text, "the place that hangs is named"
        assert "loop.py" in text
    report.unlink()
    assert "from step 20" in run.finish()
    assert describe_difference(outcome(run.run_dir), expected) == []


def test_suspended_time_is_not_a_hang(new_run: NewRun, expected: Outcome) -> None:
    run = new_run(watchdog_min_seconds=2)
    life = run.with_fault("gates", 15).start()
    life.wait_until(lambda: run.at_gate(15), "the gate")
    life.signal(signal.SIGSTOP)
    time.sleep(3)  # the test needs the time to pass
    run.open_gates(15, 25, 35, 45, 55)
    life.signal(signal.SIGCONT)
    assert life.wait() == 0
    assert describe_difference(outcome(run.run_dir), expected) == []


@pytest.mark.slow  # `test_trainer_memory.py` ends a run at the same limit
def test_out_of_memory_report_names_the_largest_arrays_and_remedies(
    new_compiled_run: NewRun,
) -> None:
    run = new_compiled_run(train_batch_size=2**20, train_accumulation=1)
    small = replace(run, limits={"RLIMIT_AS": 16 << 30})
    printed = small.finish(expected=OUT_OF_MEMORY)
    assert "Traceback" not in printed
    assert re.search(r"activations and other temporaries +[\d.]+ GiB", printed)
    assert "--train.accumulation" in printed


def test_supervisor_restarts_a_killed_run_until_it_ends(new_run: NewRun, expected: Outcome) -> None:
    run = new_run()
    gated = run.with_fault("gates", 15)
    life = replace(gated, module=(*gated.module, "--supervise")).start()
    life.wait_until(lambda: run.at_gate(15) and "pid" in run.heartbeat(), "the gate")
    os.kill(run.heartbeat()["pid"], signal.SIGKILL)
    run.open_gates(15, 25, 35, 45, 55)
    assert life.wait() == 0
    assert life.printed.count("SIGKILL") == 1
    (run.run_dir / "lives.jsonl").unlink()
    assert describe_difference(outcome(run.run_dir), expected) == []
