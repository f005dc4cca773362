"""Fuzzing campaign: a sample, and its sensitivity."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest
from campaigns import fuzz, fuzz_mutations
from campaigns.fuzz_kind import Kind, NotOursError, judge
from campaigns.fuzz_kinds import KINDS

CASES_OF_EACH_KIND = 20


@pytest.fixture(autouse=True)
def _module_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers import the modules of this process from other folders."""
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    monkeypatch.setenv("PYTHONPATH", path)


def test_sample_of_each_kind_is_rejected_or_read_correctly(tmp_path: Path) -> None:
    words = ["--seed", "1", "--cases", str(CASES_OF_EACH_KIND * len(KINDS)), "--jobs", "2"]
    done = subprocess.run(
        [sys.executable, fuzz.__file__, *words, "--output", str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found.keys() == KINDS.keys()
    for kind, counts in found.items():
        assert counts["accepted"] + counts["rejected"] == CASES_OF_EACH_KIND, kind
    # Some cases are rejected and some are accepted.
    assert sum(counts["accepted"] for counts in found.values()) > CASES_OF_EACH_KIND
    assert sum(counts["rejected"] for counts in found.values()) > 2 * CASES_OF_EACH_KIND


class Reader(Kind):
    """Fuzz kind that reads with a given function."""

    def __init__(self, read: Callable[[Path], None]) -> None:
        self.read = read

    def prepare(self, scratch: Path) -> None:
        pass

    def build(self, steps: Sequence[Random], folder: Path) -> None:
        pass

    def check(self, folder: Path) -> None:
        self.read(folder)


def rejects(folder: Path) -> None:
    raise ValueError(f"{folder}: not what it should be")


def names_nothing(folder: Path) -> None:
    raise ValueError("something is wrong")


def says_nothing(folder: Path) -> None:
    raise ValueError


def says_too_much(folder: Path) -> None:
    raise ValueError(f"{folder} " * 10_000)


def lets_json_raise(folder: Path) -> None:
    json.loads(str(folder))


def takes_what_is_wrong(folder: Path) -> None:
    raise AssertionError


def raises_another(folder: Path) -> None:
    raise KeyError("name")


def test_expected_error_counts_as_rejection(tmp_path: Path) -> None:
    assert judge(Reader(rejects), tmp_path) == "rejected"
    assert judge(Reader(lambda _: None), tmp_path) == "accepted"


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (names_nothing, NotOursError),
        (says_nothing, NotOursError),
        (says_too_much, NotOursError),
        (lets_json_raise, NotOursError),
        (takes_what_is_wrong, AssertionError),
        (raises_another, KeyError),
    ],
)
def test_any_other_outcome_is_a_failure(
    read: Callable[[Path], None], error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error):
        judge(Reader(read), tmp_path)


EVIL = """
import ctypes, sys, time
from campaigns import fuzz_worker
from campaigns.fuzz_kind import Kind

def compute():
    end = time.process_time() + 0.4
    while time.process_time() < end:
        pass

class Evil(Kind):
    name = "evil"
    def prepare(self, scratch): pass
    def build(self, steps, folder):
        self.is_sound = not steps
    def check(self, folder):
        act = {do}
        if not self.is_sound:
            act()

fuzz_worker.KINDS["evil"] = Evil
fuzz_worker.HANGING_SECONDS = {hanging_seconds}
fuzz_worker.MOST_CPU_SECONDS = 0.2
sys.exit(fuzz_worker.main())
"""


@pytest.mark.parametrize(
    ("do", "error"),
    [
        ("lambda: ctypes.string_at(0)", "process ended with -11"),
        ("lambda: time.sleep(1000)", "hang"),
        ("lambda: bytearray(3 << 30)", "MemoryError"),
        ("compute", "slow"),
    ],
    ids=["crash", "hang", "memory", "slow"],
)
def test_worker_reports_crash_hang_and_memory(
    do: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other cases must not end as hanging ones on a busy machine.
    hanging_seconds = 1 if error == "hang" else 60
    program = EVIL.replace("{do}", do).replace("{hanging_seconds}", str(hanging_seconds))
    (tmp_path / "evil.py").write_text(program)
    monkeypatch.setattr(fuzz, "WORKER", tmp_path / "evil.py")
    with fuzz.Worker("evil", 0, tmp_path / "scratch") as worker:
        answer = worker.ask(0, [])
        assert answer["verdict"] == "failed"
        assert answer["error"].startswith(error)
        # The next case runs in a new process.
        assert worker.ask(1, [])["verdict"] == "failed"


def test_case_is_a_function_of_its_seed() -> None:
    tree = {"a": [1, 2.5, "x"], "b": {"c": None, "d": True}}

    def mutated(seed: int) -> bytes:
        random = fuzz_mutations.draws(str(seed))
        return fuzz_mutations.mutate_bytes(
            fuzz_mutations.render(fuzz_mutations.mutate_tree(tree, random), random), random
        )

    before = json.dumps(tree)
    many = [mutated(seed) for seed in range(300)]
    assert many == [mutated(seed) for seed in range(300)]
    assert len(set(many)) > 200
    assert json.dumps(tree) == before
