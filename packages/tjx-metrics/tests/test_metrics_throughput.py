"""Throughput without warm-up and pauses, remaining time, and time per phase."""

import pytest

from tjx_metrics import PhaseTimer, Throughput
from tjx_metrics.performance.phase_timer import PHASES


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_warm_up_steps_are_not_measured() -> None:
    clock = Clock()
    throughput = Throughput(max_steps=12, warmup_steps=2, clock=clock)
    for seconds in (60.0, 5.0):  # compilation, and a slow second step
        clock.now += seconds
        throughput.update(tokens=1000)
        assert throughput.tokens_per_sec is None
        assert throughput.seconds_left is None
    for _ in range(4):
        clock.now += 0.5
        throughput.update(tokens=1000)
    assert throughput.tokens_per_sec == pytest.approx(2000)
    assert throughput.mean_tokens_per_sec == pytest.approx(2000)
    assert throughput.seconds_left == pytest.approx(3.0)  # six steps of half a second
    for _ in range(6):
        throughput.update(tokens=1000)
    assert throughput.seconds_left == 0.0


def test_windowed_rate_and_mean_rate() -> None:
    clock = Clock()
    throughput = Throughput(max_steps=100, warmup_steps=1, window=5, clock=clock)
    throughput.update(tokens=100)
    for seconds in [1.0] * 10 + [0.5] * 5:
        clock.now += seconds
        throughput.update(tokens=100)
    assert throughput.tokens_per_sec == pytest.approx(200)
    assert throughput.mean_tokens_per_sec == pytest.approx(1500 / 12.5)


def test_pauses_affect_the_remaining_time_but_not_the_rate() -> None:
    clock = Clock()
    throughput = Throughput(max_steps=21, warmup_steps=1, clock=clock)
    with throughput.paused():
        clock.now += 1000.0  # before the warm-up ends: counts nowhere
    throughput.update(tokens=10)
    for step in range(10):
        clock.now += 1.0
        throughput.update(tokens=10)
        if step == 4:
            with throughput.paused():
                clock.now += 20.0
    assert throughput.tokens_per_sec == pytest.approx(10)
    assert throughput.seconds_left == pytest.approx(30.0)  # ten steps at three seconds each


def test_a_pause_with_an_error_is_excluded() -> None:
    clock = Clock()
    throughput = Throughput(max_steps=5, warmup_steps=1, clock=clock)
    throughput.update(tokens=10)

    def save() -> None:
        clock.now += 7.0
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), throughput.paused():
        save()
    clock.now += 1.0
    throughput.update(tokens=10)
    assert throughput.tokens_per_sec == pytest.approx(10)


def test_a_resumed_run_has_fewer_steps_left() -> None:
    clock = Clock()
    throughput = Throughput(max_steps=100, start_step=90, warmup_steps=1, clock=clock)
    for _ in range(3):
        clock.now += 2.0
        throughput.update(tokens=1)
    assert throughput.seconds_left == pytest.approx(14.0)


def test_zero_warm_up_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match="warmup_steps, window: got 0, 50"):
        Throughput(max_steps=1, warmup_steps=0)


def test_every_second_belongs_to_one_phase() -> None:
    now = Clock()
    clock = PhaseTimer(clock=now)
    now.now += 1.0
    with clock.during("dispatch"):
        now.now += 2.0
        clock.add("data_wait", 1.5, out_of="dispatch")  # measured by who loads batches
    with clock.during("evaluation"):
        now.now += 4.0
        with clock.during("device"):
            now.now += 8.0
        spent = clock.take()  # in the midst of it
        now.now += 16.0
    assert spent == {
        "data_wait": 1.5, "dispatch": 0.5, "device": 8.0, "evaluation": 4.0, "checkpoint": 0.0,
        "other": 1.0,
    }  # fmt: skip
    assert tuple(spent) == PHASES
    now.now += 32.0
    rest = clock.take()
    assert (rest["evaluation"], rest["other"], sum(rest.values())) == (16.0, 32.0, 48.0)


def test_a_phase_with_an_error_ends() -> None:
    now = Clock()
    clock = PhaseTimer(clock=now)

    def save() -> None:
        now.now += 1.0
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), clock.during("checkpoint"):
        save()
    now.now += 2.0
    spent = clock.take()
    assert (spent["checkpoint"], spent["other"]) == (1.0, 2.0)


def test_unknown_phases_are_errors() -> None:
    clock = PhaseTimer()
    with pytest.raises(ValueError, match="expected one of data_wait, dispatch, device"):
        clock.add("devise", 1.0, out_of="other")
    with pytest.raises(ValueError, match="phase: got 'all'"):
        clock.add("device", 1.0, out_of="all")
    with pytest.raises(ValueError, match="phase: got 'devise'"), clock.during("devise"):
        pass
