"""Full disk: old checkpoints stay, partial files are removed, and space lets the run resume."""

import errno
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from campaigns.outcome import Outcome, describe_difference, outcome
from campaigns.tiny_run import RunProcess, TinyRun

pytest_plugins = ["fault_fixtures"]

NewRun = Callable[..., TinyRun]

NOT_WRITTEN, TERMINATED = 5, 143
DISK_BYTES = 8 << 20
# Free space of the full disk: metrics fit, a checkpoint of 330 kB does not.
LEFT_BYTES = 100_000


class SmallDisk:
    """A tmpfs over a run directory in a separate mount namespace, without privileges.

    The programs of the run enter it; other processes access it through ``/proc`` of the keeper.
    """

    def __init__(self, run: TinyRun, keeper: int) -> None:
        self.run = replace(run, neighbour=keeper, root=Path(f"/proc/{keeper}/root"))
        self._ballast = self.run.run_dir / "ballast"

    def fill(self) -> None:
        """Leave less free space than a checkpoint needs."""
        disk = os.statvfs(self.run.run_dir)
        self._ballast.write_bytes(bytes(disk.f_bavail * disk.f_frsize - LEFT_BYTES))

    def empty(self) -> None:
        """Free the space again."""
        self._ballast.unlink()


@pytest.fixture
def small_disk(new_run: NewRun) -> Iterator[SmallDisk]:
    run = new_run()
    place = run.folder / "run"
    place.mkdir(parents=True)
    script = f'mount -t tmpfs -o size={DISK_BYTES} tmpfs "$1" && echo mounted && exec cat'
    with subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(place)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as keeper:  # fmt: skip
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        if keeper.stdout.readline() != "mounted\n":
            pytest.skip(f"no tmpfs can be mounted here: {keeper.stderr.read().strip()}")
        yield SmallDisk(run, keeper.pid)
        keeper.kill()


def records(run: TinyRun) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]


def train_until_a_save_fails(run: TinyRun, life: RunProcess, *, gate: int) -> None:
    """Open a gate, and wait until the save between it and the next one has failed.

    A thread saves: the run can be at the next gate before the save begins. A failed save creates
    and deletes its folder.
    """
    before = run.checkpoints.stat().st_mtime_ns

    def failed() -> bool:
        return run.checkpoints.stat().st_mtime_ns != before and run.unfinished() == []

    run.open_gates(gate)
    life.wait_until(
        lambda: life.process.poll() is not None or (run.at_gate(gate + 10) and failed()),
        f"failed save after step {gate}",
    )


def test_run_stops_on_a_full_disk_and_resumes_with_free_space(
    small_disk: SmallDisk, expected: Outcome
) -> None:
    run = small_disk.run
    life = run.with_fault("gates", 15).start()
    life.wait_until(lambda: 10 in run.saved(), "step 10")
    small_disk.fill()
    train_until_a_save_fails(run, life, gate=15)
    # The error is raised at the next step, not at the next save.
    run.open_gates(25)
    assert life.wait() == NOT_WRITTEN, life.printed
    assert records(run)[-1]["step"] < 30
    assert os.strerror(errno.ENOSPC) in life.printed
    assert "Traceback" not in life.printed
    assert run.saved() == [10]
    assert run.unfinished() == []

    # Still full: another attempt loses nothing.
    assert run.finish(expected=NOT_WRITTEN)
    assert run.saved() == [10]
    assert run.unfinished() == []

    small_disk.empty()
    assert "from step 10" in run.finish()
    assert describe_difference(outcome(run.run_dir), expected) == []


def test_run_continues_on_a_full_disk_if_configured(
    small_disk: SmallDisk, expected: Outcome
) -> None:
    run = small_disk.run.elsewhere(small_disk.run.folder, checkpoint_on_error="continue")
    life = run.with_fault("gates", 15).start()
    life.wait_until(lambda: 10 in run.saved(), "step 10")
    small_disk.fill()
    for gate in (15, 25, 35):
        train_until_a_save_fails(run, life, gate=gate)
    assert run.saved() == [10]
    small_disk.empty()
    run.open_gates(45, 55)
    assert life.wait() == 0, life.printed
    assert run.saved() == [10, 50, 60]
    assert max(record.get("checkpoint/failed", 0) for record in records(run)) == 3
    found = outcome(run.run_dir)
    assert (found.leaves, found.numbers) == (expected.leaves, expected.numbers)


def test_run_stops_at_the_file_size_limit_with_its_checkpoints(
    new_run: NewRun, expected: Outcome
) -> None:
    run = new_run()
    life = run.with_fault("gates", 15).start()
    life.wait_until(lambda: 10 in run.saved(), "step 10")
    life.signal(signal.SIGTERM)
    run.open_gates(15)
    assert life.wait() == TERMINATED
    steps = run.saved()
    limited = replace(run, limits={"RLIMIT_FSIZE": 150_000})
    assert os.strerror(errno.EFBIG) in limited.finish(expected=NOT_WRITTEN)
    assert run.saved() == steps
    assert run.unfinished() == []
    run.finish()
    assert describe_difference(outcome(run.run_dir), expected) == []
