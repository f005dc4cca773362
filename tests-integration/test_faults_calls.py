"""Campaigns of failing system calls and power cuts: a sample, and their sensitivity."""

import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from campaigns import faults, power
from campaigns.fault_shim import has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the shim needs a C compiler")


@pytest.mark.parametrize(
    ("campaign", "words"),
    [(faults, ["--seed", "7", "--cases", "12"]), (power, ["--seed", "7", "--states", "8"])],
)
def test_failing_calls_lose_nothing(campaign: ModuleType, words: list[str], tmp_path: Path) -> None:
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-m", campaign.__name__, *words],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n0 failures" in done.stdout


ROOT = Path("/disk")
JOURNAL = [
    "mkdir /disk/run", "fsync /disk", "create /disk/run/a", "write /disk/run/a 0 6f6e65",
    "fsync /disk/run/a", "fsync /disk/run", "write /disk/run/a 3 74776f", "create /disk/run/b",
    "rename /disk/run/b /disk/run/c",
]  # fmt: skip


def states_of(count: int, tmp_path: Path) -> set[tuple[tuple[str, bytes], ...]]:
    """Return the possible states of a disk after a number of journal entries."""
    found = set()
    for seed in range(60):
        out = tmp_path / f"{count}-{seed}"
        out.mkdir()
        disk = power.Disk(ROOT)
        disk.replay(JOURNAL[:count])
        disk.write_state(random.Random(seed), out)  # noqa: S311  states, not secrets
        files = [path for path in sorted(out.rglob("*")) if path.is_file()]
        found.add(tuple((path.name, path.read_bytes()) for path in files))
    return found


def test_flushed_data_survives_and_unflushed_data_may_not(tmp_path: Path) -> None:
    assert states_of(1, tmp_path) == {()}
    one = states_of(4, tmp_path)
    assert {(), (("a", b""),), (("a", b"one"),)} <= one
    assert {content for ((_, content),) in one - {()}} <= {b"", b"o", b"on", b"one"}
    # A file without a flushed name is missing, although its content was flushed.
    assert () in states_of(5, tmp_path)
    assert states_of(6, tmp_path) == {(("a", b"one"),)}
    last = states_of(len(JOURNAL), tmp_path)
    assert all(dict(state)["a"].startswith(b"one") for state in last)
    assert {len(state) for state in last} == {1, 2}
    assert {name for state in last for name, _ in state} == {"a", "b", "c"}


def test_commit_requires_a_flush_of_its_folder() -> None:
    lines = [
        "rename /disk/run/checkpoints/2.tmp /disk/run/checkpoints/2",
        "fsync /disk/run/checkpoints",
        "rename /disk/run/checkpoints/4.tmp /disk/run/checkpoints/4",
    ]
    assert [power.committed(lines[:count]) for count in range(4)] == [0, 0, 2, 2]
