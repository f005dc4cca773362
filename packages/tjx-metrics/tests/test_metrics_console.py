"""Console output: bars and plain lines never exceed the available columns."""

import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from tjx_metrics import ConsoleTracker, Throughput
from tjx_metrics.trackers.status_line import Status


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that reports to be a terminal."""

    def isatty(self) -> bool:
        return True


maybe = st.none() | st.floats(0, 1e15) | st.floats(0, 50)


@given(
    step=st.integers(0, 10**9),
    max_steps=st.integers(1, 10**9),
    numbers=st.tuples(maybe, maybe, maybe, st.none() | st.floats(0, 1e9)),
    more=st.tuples(
        st.integers(0, 9), st.none() | st.floats(0, 1), st.none() | st.integers(0, 10**9)
    ),
    width=st.integers(1, 100),
)
def test_a_status_fits_and_keeps_the_step(
    step: int, max_steps: int, numbers: tuple[Any, ...], more: tuple[Any, ...], width: int
) -> None:
    line = Status(step, max_steps, *numbers, *more).line(width)
    assert len(line) <= width
    whole = f"{step:>{len(str(max_steps))}}/{max_steps}"
    assert line.startswith(whole[:width])


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (
            120,
            "599990/600000  loss 10.825  eval 10.825  475k tok/s  41% MFU  saved 599000  2:07 left",
        ),
        (80, "599990/600000  loss 10.825  eval 10.825  475k tok/s  saved 599000  2:07 left"),
        (60, "599990/600000  loss 10.825  eval 10.825  2:07 left"),
        (40, "599990/600000  loss 10.825  2:07 left"),
        (10, "599990/600"),
    ],
)
def test_the_least_important_fields_are_omitted_first(width: int, line: str) -> None:
    status = Status(599_990, 600_000, 10.825, 10.825, 475_000.0, 127.0, mfu=0.41, saved=599_000)
    assert status.line(width) == line


def test_a_non_finite_loss_is_shown() -> None:
    assert "loss nan" in Status(1, 2, float("nan")).line(80)


def test_skipped_steps_are_shown_if_positive() -> None:
    clock = Clock()
    console, stream = plain(clock)
    for step, skipped in ((10, 0.0), (20, 1.0)):
        clock.now += 10.0
        console.log({"train/loss": 3.0, "train/skipped": skipped}, step=step)
    console.finish()
    before, after = stream.getvalue().splitlines()[:2]
    assert "skipped" not in before
    assert "1 skipped" in after


def plain(clock: Clock) -> tuple[ConsoleTracker, io.StringIO]:
    stream = io.StringIO()
    return ConsoleTracker(1000, stream=stream, clock=clock, plain_seconds=10.0), stream


def test_plain_lines_are_periodic_and_follow_evaluations() -> None:
    clock = Clock()
    console, stream = plain(clock)
    for step in range(1, 1001):
        clock.now += 0.1
        console.update(step)
        if step % 10 == 0:
            console.log({"train/loss": 3.0, "train/tokens_per_sec": 1e6}, step=step)
        if step % 500 == 0:
            console.log({"eval/loss": 3.5}, step=step)
    console.finish()
    lines = stream.getvalue().splitlines()
    # 100 s: a first line, one every 10 s, two evaluations; the last line is not repeated.
    assert 11 <= len(lines) <= 13
    assert all(len(line) <= 80 for line in lines)
    assert "\x1b" not in stream.getvalue()
    assert lines[-1] == "1000/1000  loss 3.000  eval 3.500  1.00M tok/s"


def test_the_first_loss_is_printed_at_once() -> None:
    console, stream = plain(Clock())
    console.log({"eval/loss": 7.5}, step=0)
    console.log({"train/loss": 7.0}, step=10)
    console.log({"train/loss": 6.0}, step=20)
    assert stream.getvalue().splitlines() == [
        "   0/1000  eval 7.500", "  10/1000  loss 7.000  eval 7.500",
    ]  # fmt: skip


def test_notes_are_separate_lines() -> None:
    console, stream = plain(Clock())
    console.note("compiling [12 layers]")
    console.log_summary({"eval/loss": 3.25, "run": "runs/a"})
    console.finish()
    assert stream.getvalue() == "compiling [12 layers]\neval/loss  3.25\nrun        runs/a\n"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def drawn(terminal: Terminal) -> list[str]:
    """Split output into displayed lines, without control sequences."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    return [line for line in re.split(r"[\r\n]+", text) if line]


def test_a_terminal_shows_a_bar_and_its_cursor_is_restored(terminal: Terminal) -> None:
    clock = Clock()
    throughput = Throughput(max_steps=100, warmup_steps=1, clock=clock)
    console = ConsoleTracker(100, throughput=throughput, stream=terminal, clock=clock)
    console.note("compiling")
    for step in range(1, 101):
        clock.now += 1.0
        throughput.update(tokens=4096)
        console.log({"train/loss": 3.0}, step=step)
        if step == 50:
            console.log({"eval/loss": 3.5, "train/mfu": 0.004, "checkpoint/step": 40}, step=step)
            console.note("saved [step] 50")
    console.log_summary({"eval/loss": 3.5})
    console.finish()
    console.finish()

    lines = drawn(terminal)
    assert max(cell_len(line) for line in lines) <= 80
    assert "saved [step] 50" in lines
    assert any(
        "60/100  loss 3.000  eval 3.500  4.10k tok/s  0.4% MFU  saved 40  0:40 left" in line
        for line in lines
    )
    assert "100/100" in lines[-2]
    assert lines[-1] == "eval/loss  3.5"
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


def test_the_refresh_rate_of_the_bar_is_limited(terminal: Terminal) -> None:
    clock = Clock()
    console = ConsoleTracker(10_000, stream=terminal, clock=clock)
    for step in range(10_000):
        clock.now += 0.001
        console.update(step)
    console.finish()
    assert 90 <= sum("/10000" in line for line in drawn(terminal)) <= 110


def test_a_dumb_terminal_shows_plain_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = ConsoleTracker(10, stream=terminal)
    console.log({"train/loss": 3.0}, step=1)
    console.finish()
    assert terminal.getvalue() == " 1/10  loss 3.000\n"


def test_a_narrow_terminal_shows_fewer_complete_fields(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    console = ConsoleTracker(100, stream=terminal)
    console.log({"train/loss": 3.0, "eval/loss": 3.5, "train/tokens_per_sec": 1e6}, step=50)
    console.log({"checkpoint/step": 40, "checkpoint/failed": 2, "train/mfu": 0.4}, step=51)
    console.finish()
    lines = [line.rstrip() for line in drawn(terminal)]
    assert max(cell_len(line) for line in lines) <= 40
    assert lines[0] == " 50/100  loss 3.000  eval 3.500"
    assert lines[-1] == " 51/100  loss 3.000  2 saves failed"
