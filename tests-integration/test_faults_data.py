"""Training data damaged during a run: a named error, and recovery with the restored file."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from campaigns.outcome import Outcome, describe_difference, outcome
from campaigns.tiny_run import TinyRun

pytest_plugins = ["fault_fixtures"]

NewRun = Callable[..., TinyRun]

UNEXPECTED, DATA_DAMAGED = 1, 9


def shard_of(run: TinyRun) -> Path:
    (shard,) = (run.folder / "prepared").rglob("train_00000.bin")
    return shard


def flip_bit(shard: Path) -> None:
    with shard.open("r+b") as file:  # in place, never shorter
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def cut_in_half(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


@pytest.mark.parametrize(
    "fault",
    # `test_data_faults.py` cuts and deletes shards too.
    [
        flip_bit,
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in (cut_in_half, Path.unlink)),
    ],
)
def test_shard_damaged_while_read_ends_the_run_with_its_name(
    new_run: NewRun, expected: Outcome, fault: Callable[[Path], None]
) -> None:
    run = new_run(data_cache_dir="prepared")
    life = run.with_fault("slow_disk", 8).start()
    life.wait_until(lambda: run.unfinished() != [], "a save")
    shard = shard_of(run)
    name, good = str(shard.relative_to(run.folder)), shard.read_bytes()
    fault(shard)
    assert life.wait() == DATA_DAMAGED, life.printed
    assert name in life.printed
    assert "Traceback" not in life.printed

    # A restart without the file fails before the first step.
    assert name in run.finish(expected=DATA_DAMAGED)

    shard.write_bytes(good)
    assert "from step" in run.finish()
    assert describe_difference(outcome(run.run_dir), expected) == []


def test_dead_data_worker_ends_the_run(new_run: NewRun, expected: Outcome) -> None:
    run = new_run()
    assert "the worker is dead" in run.with_fault("worker", 25).finish(expected=UNEXPECTED)
    assert "from step 20" in run.finish()
    assert describe_difference(outcome(run.run_dir), expected) == []
