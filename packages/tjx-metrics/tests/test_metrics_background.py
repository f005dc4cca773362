"""Background trackers: failing, blocking or dying trackers do not affect the run."""

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tjx_metrics import (
    BackgroundTracker,
    CompositeTracker,
    Histogram,
    JsonlTracker,
    Tracker,
    TrackerWarning,
    read_metrics,
)

PAUSE = 0.01


class Memory:
    """A tracker that stores its records, and fails on request."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.made: list[bool] = []
        self.finished = 0
        self.fail: Callable[[str], object] = str  # nothing fails

    def make(self, first: bool) -> "Remembering":
        self.fail("make")
        self.made.append(first)
        return Remembering(self)


class Remembering:
    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def _take(self, *call: Any) -> None:
        self.memory.fail(str(call[-1]))
        self.memory.calls.append(call)

    def log_hyperparameters(self, hyperparameters: Any) -> None:
        self._take("hyperparameters", hyperparameters)

    def log(self, metrics: Any, step: int) -> None:
        self._take("log", metrics, step)

    def log_histograms(self, histograms: Any, step: int) -> None:
        self._take("histograms", histograms, step)

    def log_texts(self, texts: Any, step: int) -> None:
        self._take("texts", texts, step)

    def log_summary(self, summary: Any) -> None:
        self._take("summary", summary)

    def finish(self) -> None:
        self.memory.finished += 1


def background(memory: Memory, **options: Any) -> BackgroundTracker:
    return BackgroundTracker(memory.make, "fake", first_pause=PAUSE, **options)


@contextmanager
def caught_warnings() -> Iterator[list[str]]:
    """Collect tracker warnings; other warnings are errors."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    assert {warning.category for warning in caught} <= {TrackerWarning}
    messages += [str(warning.message) for warning in caught]


def steps(memory: Memory) -> list[int]:
    return [call[2] for call in memory.calls if call[0] == "log"]


def test_records_are_delivered_in_order() -> None:
    memory = Memory()
    tracker = background(memory)
    assert isinstance(tracker, Tracker)
    tracker.log_hyperparameters({"a": 1})
    tracker.log({"x": np.float32(0.5)}, step=1)
    histogram = Histogram(np.array([3]), np.array([0.0, 1.0]))
    tracker.log_histograms({"h": histogram}, step=1)
    tracker.log_texts({"t": "text"}, step=1)
    tracker.log_summary({"best": 0.5})
    tracker.finish()
    tracker.finish()
    histograms = memory.calls.pop(2)
    assert histograms[1]["h"].counts.tolist() == [3]
    assert memory.calls == [
        ("hyperparameters", {"a": 1}),
        ("log", {"x": 0.5}, 1),
        ("texts", {"t": "text"}, 1),
        ("summary", {"best": 0.5}),
    ]
    assert (memory.made, memory.finished) == ([True], 1)
    with pytest.raises(ValueError, match="the tracker fake is finished"):
        tracker.log({"x": 1.0}, step=2)


def test_invalid_metrics_raise_in_the_caller() -> None:
    tracker = background(Memory())
    with pytest.raises(ValueError, match="expected a single real number"):
        tracker.log({"x": np.zeros(2)}, step=1)
    tracker.finish()


@pytest.mark.parametrize("what", ["make", "3"])
def test_a_temporarily_failing_tracker_is_recreated_and_gets_all_records(what: str) -> None:
    memory, failures = Memory(), 0
    failed = threading.Event()

    def fail(now: str) -> None:
        nonlocal failures
        if now == what and failures < 2:
            failures += 1
            failed.set()
            raise ConnectionError("the service\nis gone")

    memory.fail = fail
    tracker = background(memory)
    with caught_warnings() as messages:
        for step in range(1, 6):
            tracker.log({"x": 1.0}, step=step)
        assert failed.wait(30)
        while not tracker._problem:
            failed.wait(PAUSE)
        for step in (6, 7):
            tracker.log({"x": 1.0}, step=step)
        tracker.finish()
    assert messages == [
        "tracker fake: ConnectionError: the service; training continues and the tracker is retried"
    ]
    assert steps(memory) == [1, 2, 3, 4, 5, 6, 7]
    assert memory.made == ([True] if what == "make" else [True, False, False])


def test_a_record_that_always_fails_does_not_block_others() -> None:
    memory = Memory()

    def fail(now: str) -> None:
        if now == "2":
            raise TypeError("not this one")

    memory.fail = fail
    tracker = background(memory)
    with caught_warnings() as messages:
        for step in range(1, 5):
            tracker.log({"x": 1.0}, step=step)
        tracker.finish()
    assert "1 records are lost (TypeError: not this one)" in messages[-1]
    assert steps(memory) == [1, 3, 4]


def blocking() -> tuple[Memory, threading.Event, threading.Event]:
    """Return a tracker's memory, an event set when it blocks, and one that releases it."""
    memory, blocked, let_go = Memory(), threading.Event(), threading.Event()

    def fail(now: str) -> None:
        if now != "make":
            blocked.set()
            assert let_go.wait(30)

    memory.fail = fail
    return memory, blocked, let_go


def test_a_blocked_tracker_has_a_bounded_queue_and_warns_of_lost_records() -> None:
    memory, blocked, let_go = blocking()
    tracker = background(memory, max_kept=10)
    with caught_warnings() as messages:
        tracker.log({"x": 1.0}, step=1)
        assert blocked.wait(30)
        for step in range(2, 31):
            tracker.log({"x": 1.0}, step=step)
        assert len(tracker._waiting) == 10
        tracker.finish(timeout=0.0)
    let_go.set()
    assert messages == [
        "tracker fake: accepts no records; training continues and the tracker is retried",
        "tracker fake: 30 records are lost; metrics.jsonl has them",
    ]


def test_a_released_tracker_gets_the_newest_records() -> None:
    memory, blocked, let_go = blocking()
    tracker = background(memory, max_kept=10)
    with caught_warnings() as messages:
        tracker.log({"x": 1.0}, step=1)
        assert blocked.wait(30)
        for step in range(2, 31):
            tracker.log({"x": 1.0}, step=step)
        let_go.set()
        tracker.finish()
    assert steps(memory) == [1, *range(21, 31)]
    assert "19 records are lost" in messages[-1]


def test_a_failing_tracker_does_not_affect_others(tmp_path: Path) -> None:
    def broken(first: bool) -> Tracker:
        raise OSError("no such server")

    memory = Memory()
    path = tmp_path / "metrics.jsonl"
    failing = BackgroundTracker(broken, "broken")
    composite = CompositeTracker([JsonlTracker(path), failing, background(memory)])
    with caught_warnings() as messages:
        for step in range(1, 101):
            composite.log({"x": 1.0}, step=step)
        failing.finish(timeout=0.1)
        composite.finish()
    assert [record["step"] for record in read_metrics(path)] == list(range(1, 101))
    assert steps(memory) == list(range(1, 101))
    assert "100 records are lost (OSError: no such server)" in messages[-1]


BLOCKED = """
import sys, threading, time, warnings
from tjx_metrics import BackgroundTracker
warnings.simplefilter("ignore")
def make(first):
    threading.Event().wait()
tracker = BackgroundTracker(make, "blocked", finish_seconds=0.1)
tracker.log({"x": 1.0}, step=1)
if sys.argv[1] == "finish":
    tracker.finish()
"""


@pytest.mark.parametrize("end", ["finish", "no"])
def test_a_blocked_tracker_does_not_block_the_exit(end: str) -> None:
    subprocess.run([sys.executable, "-c", BLOCKED, end], check=True, timeout=60)
