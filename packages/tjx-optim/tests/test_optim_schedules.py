"""Each schedule equals its closed form at every step."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_optim import SCHEDULES, ScheduleConfig, make_schedule
from tjx_optim.schedule_config import ScheduleName

PEAK = 6e-4


def closed_form(name: str, step: int, warmup: int, end: int, final: float) -> Any:
    """Rate of a step over the peak, written out from nanoGPT's rules in float64."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if name == "constant":
        return 1.0
    done = min((step - warmup) / (end - warmup), 1.0)
    if name == "linear":
        return 1.0 - (1.0 - final) * done
    assert name == "cosine"
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))


def rates(config: Any, max_steps: int, steps: int) -> Any:
    schedule = make_schedule(config, learning_rate=PEAK, max_steps=max_steps)
    out = jax.jit(jax.vmap(schedule))(jax.device_put(np.arange(steps, dtype=np.int32)))
    # A constant does not depend on the step; vmap broadcasts it.
    return np.asarray(out, np.float64)


def test_the_closed_forms_cover_the_whole_table() -> None:
    assert set(SCHEDULES) == {"cosine", "linear", "constant"}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@settings(max_examples=8, deadline=None)
@given(
    warmup=st.integers(0, 40),
    decay=st.integers(1, 60),
    final=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    explicit=st.booleans(),
)
def test_every_step_equals_the_closed_form(
    name: ScheduleName, warmup: int, decay: int, final: float, explicit: bool
) -> None:
    end = warmup + decay
    config = ScheduleConfig(
        name=name,
        warmup_steps=warmup,
        decay_steps=end if explicit else None,
        final_fraction=final,
    )

    got = rates(config, max_steps=end + 7 if explicit else end, steps=128)

    want = [PEAK * closed_form(name, step, warmup, end, final) for step in range(128)]
    np.testing.assert_allclose(got, want, rtol=0, atol=PEAK * 1e-6)


def test_the_warm_up_rises_to_the_peak_without_a_zero_or_a_plateau() -> None:
    got = rates(ScheduleConfig(name="cosine", warmup_steps=4), max_steps=100, steps=6) / PEAK
    np.testing.assert_allclose(got[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert got[5] < 1.0


def test_decay_steps_none_ends_with_the_run() -> None:
    config = ScheduleConfig(name="linear", warmup_steps=10, final_fraction=0.0)
    got = rates(config, max_steps=50, steps=60)
    assert got[49] > PEAK * 0.02
    np.testing.assert_allclose(got[50:], 0.0, atol=PEAK * 1e-7)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_run_shorter_than_its_warm_up_only_warms_up(name: ScheduleName) -> None:
    got = rates(ScheduleConfig(name=name, warmup_steps=100), max_steps=2, steps=2) / PEAK
    np.testing.assert_allclose(got, [1 / 101, 2 / 101], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_step_may_be_a_python_int_or_a_traced_int32(name: ScheduleName) -> None:
    config = ScheduleConfig(name=name, warmup_steps=3)
    schedule = make_schedule(config, learning_rate=PEAK, max_steps=20)
    traced = jax.jit(lambda step: jnp.asarray(schedule(step)))(jax.device_put(np.int32(7)))
    with jax.transfer_guard("allow"):
        assert np.asarray(schedule(7)) == pytest.approx(float(traced), rel=1e-6)
    assert traced.dtype == jnp.float32
    assert traced.shape == ()


def test_a_late_step_of_a_long_run_is_not_rounded_away() -> None:
    # 600,000 steps: consecutive rates of a cosine must still differ in mid-run.
    schedule = make_schedule(
        ScheduleConfig(warmup_steps=2000), learning_rate=1.0, max_steps=600_000
    )
    steps = jax.device_put(np.array([300_000, 300_100], np.int32))
    first, second = np.asarray(jax.jit(jax.vmap(schedule))(steps), np.float64)
    want = closed_form("cosine", 300_000, 2000, 600_000, 0.1) - closed_form(
        "cosine", 300_100, 2000, 600_000, 0.1
    )
    assert first - second == pytest.approx(want, rel=0.01)


def test_max_steps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_steps=0: must be at least 1"):
        make_schedule(ScheduleConfig(), learning_rate=PEAK, max_steps=0)


def test_the_schedule_counts_the_updates_of_the_optimizer() -> None:
    # The first update takes the rate of step 0.
    schedule = make_schedule(ScheduleConfig(warmup_steps=1), learning_rate=1.0, max_steps=10)
    scale = optax.scale_by_schedule(schedule)
    with jax.transfer_guard("allow"):
        updates, _ = scale.update(jnp.ones(()), scale.init(jnp.ones(())))
    assert np.asarray(updates) == 0.5
