"""Each schedule equals its closed form at every step."""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tjx_optim import SCHEDULES, ScheduleConfig, learning_rates, make_schedule
from tjx_optim.schedule_config import ScheduleName

PEAK = 6e-4
NAMES = ("constant", "linear", "cosine", "inverse_sqrt", "wsd", "one_cycle", "piecewise")
PIECES = {"boundaries": (0.4, 0.7), "factors": (0.3, 0.1)}


def fall(shape: str, done: float) -> float:
    """Height of a decay, from 1 to 0, at the completed fraction `done`."""
    if shape == "linear":
        return 1 - done
    if shape == "sqrt":  # Hägele et al., 2024
        return 1 - math.sqrt(done)
    assert shape == "cosine"  # Loshchilov and Hutter, 2017
    return 0.5 * (1 + math.cos(math.pi * done))


def whole(length: Fraction | int) -> int:
    """Round to the nearest step, halves up."""
    return math.floor(Fraction(length) + Fraction(1, 2))


def closed_form(name: str, s: int, max_steps: int, **given: Any) -> float:
    """Rate of step s over the peak, from the papers and nanoGPT's rules, in float64."""
    final, pieces = given.get("final_fraction", 0.1), zip(*_pieces(given), strict=True)

    def part(fraction: float) -> Fraction:
        return Fraction(str(fraction)) * max_steps

    warmup: Any = given.get("warmup_steps", 0)
    if given.get("warmup_fraction") is not None:
        warmup = whole(part(given["warmup_fraction"]))
    elif name == "one_cycle" and warmup == 0:
        warmup = whole(part(0.3))
    end: Any = given.get("decay_steps") or max_steps
    if given.get("decay_fraction") is not None:
        end = part(given["decay_fraction"])
    falls_from = warmup
    if name == "wsd":
        cooldown: Any = given.get("cooldown_steps") or part(given.get("cooldown_fraction") or 0.2)
        falls_from = whole(end - cooldown)
    end = whole(end)

    if s < warmup and name == "one_cycle":  # Smith and Topin, 2018, with a cosine for the line
        start = given.get("start_fraction", 0.04)
        return float(start + (1 - start) * 0.5 * (1 - math.cos(math.pi * s / warmup)))
    if s < warmup:
        return float((s + 1) / (warmup + 1))
    if name == "constant":
        return 1.0
    if name == "inverse_sqrt":  # Vaswani et al., 2017, (3), with step s + 1 and warm-up W + 1
        n, w = s + 1, warmup + 1
        return float(min(n**-0.5, n * w**-1.5) / w**-0.5)
    if name == "piecewise":
        rate = 1.0
        for at, factor in pieces:
            if s >= (whole(part(at)) if isinstance(at, float) else at):
                rate = factor
        return rate
    if s < falls_from:
        return 1.0
    if s >= end:
        return float(final)
    done = (s - falls_from) / (end - falls_from)
    shape = {"linear": "linear", "wsd": given.get("cooldown_shape", "linear")}.get(name, "cosine")
    return float(final + (1 - final) * fall(shape, done))


def _pieces(given: Any) -> Any:
    return given.get("boundaries", ()), given.get("factors", ())


def check(name: str, steps: Any, max_steps: int, **given: Any) -> None:
    config: Any = ScheduleConfig(name=name, **given)
    got = learning_rates(config, learning_rate=PEAK, max_steps=max_steps, steps=np.asarray(steps))
    want = [PEAK * closed_form(name, int(step), max_steps, **given) for step in steps]
    # Float32's precision relative to the rate, and where the closed form itself cancels in float64
    # (1 + cos near pi), relative to the peak in that.
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=PEAK * 1e-15)


@st.composite
def fields_of(draw: Any, name: str, max_steps: int, *, in_steps: bool) -> dict[str, Any]:
    """Draw the fields of a schedule, in steps or in fractions, some of them missing."""
    given: dict[str, Any] = {}
    parts = st.integers(1, 999).map(lambda n: n / 1000)
    if in_steps:
        given["warmup_steps"] = draw(st.integers(0, max_steps - 1))
    else:
        given["warmup_fraction"] = draw(parts)
    if name in ("linear", "cosine", "wsd", "one_cycle"):
        given["final_fraction"] = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        if draw(st.booleans()):
            length = st.integers(1, max_steps + 9) if in_steps else parts
            given["decay_steps" if in_steps else "decay_fraction"] = draw(length)
    if name == "one_cycle":
        given["start_fraction"] = draw(st.sampled_from([0.0, 0.04, 1.0]))
    if name == "wsd":
        given["cooldown_shape"] = draw(st.sampled_from(["linear", "cosine", "sqrt"]))
        length = st.integers(1, max_steps) if in_steps else parts
        given["cooldown_steps" if in_steps else "cooldown_fraction"] = draw(length)
    if name == "piecewise":
        lengths: Any = st.integers(1, max_steps + 9) if in_steps else parts
        at = sorted(draw(st.sets(lengths, min_size=1, max_size=3)))
        given["boundaries"] = tuple(at)
        given["factors"] = tuple(draw(st.sampled_from([0.0, 0.3, 1.0])) for _ in at)
    return given


@pytest.mark.parametrize("in_steps", [True, False])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(data=st.data(), max_steps=st.integers(1, 200))
def test_every_step_equals_the_closed_form(
    name: str, in_steps: bool, data: Any, max_steps: int
) -> None:
    given = data.draw(fields_of(name, max_steps, in_steps=in_steps))
    try:
        ScheduleConfig(name=name, **given).in_steps(max_steps)
    except ValueError:
        assume(False)  # lengths that do not fit into the run
    check(name, range(max_steps + 7), max_steps, **given)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_steps", [10**7, 2**24 + 3, 2**31 - 1])
def test_late_steps_of_long_runs_are_exact(name: str, max_steps: int) -> None:
    given: dict[str, Any] = {"warmup_steps": 10**6}
    if name in ("linear", "cosine", "wsd", "one_cycle"):
        given["final_fraction"] = 0.0
    if name == "wsd":
        given["cooldown_shape"] = "sqrt"
    given |= PIECES if name == "piecewise" else {}
    config = ScheduleConfig(name=name, **given).in_steps(max_steps)
    turns = [0, config.warmup, config.decay or 0, *config.boundaries, max_steps]
    near = {turn + side for turn in turns for side in (-1000, -10, -1, 0, 1, 10, 1000)}
    spread = np.linspace(0, max_steps - 1, 50).astype(int).tolist()
    steps = [step for step in sorted({*near, *spread}) if 0 <= step < max_steps]
    # Far from 0 the closed form's 1 - sqrt and 1 + cos lose digits in float64 as well.
    ours = learning_rates(
        ScheduleConfig(name=name, **given),
        learning_rate=1.0,
        max_steps=max_steps,
        steps=np.asarray(steps),
    )
    want = [closed_form(name, step, max_steps, **given) for step in steps]
    np.testing.assert_allclose(ours, want, rtol=1e-6, atol=1e-15)


def test_the_closed_forms_cover_the_whole_table() -> None:
    assert set(SCHEDULES) == set(NAMES)


def test_the_inverse_square_root_equals_the_paper_with_and_without_a_warm_up() -> None:
    def paper(step: int, warmup: int, d_model: int = 512) -> float:  # Vaswani et al., 2017, (3)
        return float(d_model**-0.5 * min(step**-0.5, step * warmup**-1.5))

    for warmup in (0, 1, 40):
        config = ScheduleConfig(name="inverse_sqrt", warmup_steps=warmup)
        peak = paper(warmup + 1, warmup + 1)
        got = learning_rates(config, learning_rate=peak, max_steps=300)
        # Its steps and its warm-up count from 1.
        np.testing.assert_allclose(got, [paper(s + 1, warmup + 1) for s in range(300)], rtol=1e-6)


def test_the_warm_up_rises_to_the_peak_without_a_zero_or_a_plateau() -> None:
    config = ScheduleConfig(name="cosine", warmup_steps=4)
    got = learning_rates(config, learning_rate=1.0, max_steps=100)
    np.testing.assert_allclose(got[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert got[5] < 1.0


def test_one_cycle_rises_from_its_start_to_the_peak_by_a_cosine() -> None:
    config = ScheduleConfig(name="one_cycle", start_fraction=0.2, final_fraction=0.0)
    got = learning_rates(config, learning_rate=1.0, max_steps=20)  # rises for 0.3 * 20 = 6 steps
    np.testing.assert_allclose(got[[0, 3, 6, 13]], [0.2, 0.6, 1.0, 0.5], rtol=1e-6)
    assert got.argmax() == 6


def test_the_hold_is_at_the_peak_up_to_the_cool_down() -> None:
    config = ScheduleConfig(name="wsd", warmup_steps=2, cooldown_steps=4, final_fraction=0.0)
    got = learning_rates(config, learning_rate=1.0, max_steps=12, steps=np.arange(14))
    want = [1 / 3, 2 / 3, *[1] * 7, 0.75, 0.5, 0.25, 0, 0]  # step 8 is the last one at the peak
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_decimal_fractions_are_rounded_to_the_nearest_step() -> None:
    def warmup(fraction: float, max_steps: int) -> int:
        return ScheduleConfig(warmup_fraction=fraction).in_steps(max_steps).warmup

    assert warmup(0.29, 100) == 29  # 28.999999999999996 in float64
    assert warmup(0.145, 100) == 15  # 14.499999999999998 in float64: a half, and halves go up
    assert warmup(0.125, 100) == 13  # a half that round() would take down
    assert warmup(0.124, 100) == 12
    assert warmup(0.001, 100) == 0


@pytest.mark.parametrize("max_steps", range(1, 12))
def test_fractions_that_fill_a_run_fit_into_runs_of_any_length(max_steps: int) -> None:
    config = ScheduleConfig(name="wsd", warmup_fraction=0.5, cooldown_fraction=0.5)
    steps = config.in_steps(max_steps)
    assert steps.decay == steps.warmup or steps.warmup == max_steps
    assert steps.end == max_steps


def test_a_cool_down_of_less_than_half_a_step_still_ends_at_the_final_rate() -> None:
    config = ScheduleConfig(name="wsd", decay_steps=10, cooldown_fraction=0.01)
    got = learning_rates(config, learning_rate=1.0, max_steps=20)
    np.testing.assert_allclose(got, [1.0] * 10 + [0.1] * 10, rtol=1e-6)


def test_a_decay_ends_with_the_run_by_default() -> None:
    config = ScheduleConfig(name="linear", warmup_steps=10, final_fraction=0.0)
    got = learning_rates(config, learning_rate=1.0, max_steps=50, steps=np.arange(60))
    assert got[49] > 0.02
    np.testing.assert_array_equal(got[50:], 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_shorter_than_its_warm_up_only_warms_up(name: ScheduleName) -> None:
    pieces: Any = PIECES if name == "piecewise" else {}
    config = ScheduleConfig(name=name, warmup_steps=100, **pieces)
    got = learning_rates(config, learning_rate=1.0, max_steps=2)
    longer = learning_rates(config, learning_rate=1.0, max_steps=1000)
    np.testing.assert_array_equal(got, longer[:2])
    assert got[0] < got[1] < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_the_step_may_be_an_int_or_an_int32_traced_or_mapped_over(name: ScheduleName) -> None:
    pieces: Any = PIECES if name == "piecewise" else {}
    config = ScheduleConfig(name=name, warmup_steps=3, **pieces)
    schedule = make_schedule(config, learning_rate=PEAK, max_steps=20)
    mapped = learning_rates(config, learning_rate=PEAK, max_steps=20)
    for step in (1, 7, 19):
        traced = jax.jit(lambda step: jnp.asarray(schedule(step)))(jax.device_put(np.int32(step)))
        assert traced.dtype == jnp.float32
        assert traced.shape == ()
        with jax.transfer_guard("allow"):
            eager = [np.asarray(schedule(kind(step))) for kind in (int, np.int32, jnp.int32)]
        np.testing.assert_allclose([*eager, traced], mapped[step], rtol=3e-7)


def test_rates_are_those_of_the_whole_run_by_default() -> None:
    config = ScheduleConfig(name="linear", final_fraction=0.0)
    every = learning_rates(config, learning_rate=4.0, max_steps=4)
    assert every.dtype == np.float32
    np.testing.assert_allclose(every, [4, 3, 2, 1], rtol=1e-6)
    some = learning_rates(config, learning_rate=4.0, max_steps=4, steps=np.array([3, 0]))
    np.testing.assert_allclose(some, [1, 4], rtol=1e-6)


@pytest.mark.parametrize("max_steps", [0, -1, 2**31])
def test_run_lengths_beyond_int32_raise(max_steps: int) -> None:
    with pytest.raises(
        ValueError, match=f"max_steps: got {max_steps}; expected at least 1 and below"
    ):
        make_schedule(ScheduleConfig(), learning_rate=PEAK, max_steps=max_steps)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_an_invalid_peak_raises(rate: float) -> None:
    with pytest.raises(ValueError, match=f"learning_rate: got {rate}; expected a finite number"):
        make_schedule(ScheduleConfig(), learning_rate=rate, max_steps=10)


def test_the_schedule_counts_the_updates_of_the_optimizer() -> None:
    # The first update uses the rate of step 0.
    schedule = make_schedule(ScheduleConfig(warmup_steps=1), learning_rate=1.0, max_steps=10)
    scale = optax.scale_by_schedule(schedule)
    with jax.transfer_guard("allow"):
        updates, _ = scale.update(jnp.ones(()), scale.init(jnp.ones(())))
    assert np.asarray(updates) == 0.5
