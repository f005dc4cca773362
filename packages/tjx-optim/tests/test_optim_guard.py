"""Non-finite steps change nothing, are counted, and halve the loss scale of float16."""

from dataclasses import fields
from functools import partial
from typing import Any

import docstring_parser
import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_optim import (
    GuardConfig,
    OptimizerConfig,
    accumulate_gradients,
    global_norm,
    init_guard,
    is_finite,
    make_optimizer,
    select_finite,
    update_guard,
)

OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.1))
CONFIG = GuardConfig(initial_scale=8.0, growth_interval=3, min_scale=2.0)


def loss_sum(params: Any, batch: Any) -> Any:
    error = batch["x"] @ params["kernel"] - batch["y"]
    return (error**2).sum(), (np.int32(1) * error.size, {})


@jax.jit
def step(params: Any, state: Any, microbatches: Any) -> Any:
    out = accumulate_gradients(loss_sum, params, microbatches)
    updates, new_state = OPTIMIZER.update(out.gradients, state, params)
    finite = is_finite((out.loss, global_norm(out.gradients)))
    new = (optax.apply_updates(params, updates), new_state)
    return select_finite(finite, new, (params, state)), finite


def start() -> Any:
    rng = np.random.default_rng(0)
    params = jax.device_put({"kernel": rng.normal(size=(4, 2)).astype("f")})
    x = rng.normal(size=(3, 5, 4)).astype("f")
    microbatches = {"x": x, "y": rng.normal(size=(3, 5, 2)).astype("f")}
    return params, jax.jit(OPTIMIZER.init)(params), microbatches


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_one_non_finite_input_changes_no_bit_of_the_state(poison: float) -> None:
    params, state, microbatches = start()
    (params, state), finite = step(params, state, jax.device_put(microbatches))
    assert bool(finite)
    before = jax.device_get((params, state))
    microbatches["x"][1, 2, 3] = poison

    (params, state), finite = step(params, state, jax.device_put(microbatches))

    assert not bool(finite)
    after = jax.device_get((params, state))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert old.tobytes() == new.tobytes()


def test_a_skipped_step_does_not_change_the_next_one() -> None:
    params, state, microbatches = start()
    good = jax.device_put(microbatches)
    bad = jax.device_put({**microbatches, "x": microbatches["x"] * np.float32("nan")})

    (with_bad, _), _ = step(*step(*step(params, state, good)[0], bad)[0], good)
    (without, _), _ = step(*step(params, state, good)[0], good)

    np.testing.assert_array_equal(np.asarray(with_bad["kernel"]), np.asarray(without["kernel"]))


@partial(jax.jit, static_argnums=1)
def guard_after(finite: Any, scales_loss: bool) -> Any:
    """Return the guard after each step of a sequence."""

    def advance(guard: Any, finite: Any) -> Any:
        guard = update_guard(guard, finite, CONFIG, scales_loss=scales_loss)
        return guard, guard

    return jax.lax.scan(advance, init_guard(CONFIG, scales_loss=scales_loss), finite)[1]


@settings(max_examples=30)
@given(finite=st.lists(st.booleans(), min_size=16, max_size=16))
def test_the_scale_halves_to_its_minimum_and_doubles_after_finite_steps(finite: list[bool]) -> None:
    guards = jax.device_get(guard_after(jax.device_put(np.array(finite)), True))

    scale, good, skipped, in_a_row = 8.0, 0, 0, 0
    for i, ok in enumerate(finite):
        if ok:
            good, in_a_row = good + 1, 0
            if good == 3:
                scale, good = scale * 2, 0
        else:
            in_a_row += scale == 2.0
            scale, good, skipped = max(scale / 2, 2.0), 0, skipped + 1
        assert [field[i] for field in guards] == [scale, good, skipped, in_a_row]


def test_without_a_loss_scale_each_skipped_step_counts() -> None:
    finite = [True, False, False, True, False]
    guards = jax.device_get(guard_after(jax.device_put(np.array(finite)), False))
    assert guards.loss_scale.tolist() == [1.0] * 5
    assert guards.skipped.tolist() == [0, 1, 2, 2, 3]
    assert guards.skipped_in_a_row.tolist() == [0, 1, 2, 0, 1]


def test_all_problems_of_a_guard_are_reported_together() -> None:
    with pytest.raises(ValueError, match="max_skipped: got 0") as error:
        GuardConfig(max_skipped=0, growth_interval=0, initial_scale=3.0, min_scale=-1.0)
    names = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert names == ["max_skipped", "growth_interval", "initial_scale", "min_scale"]
    with pytest.raises(
        ValueError, match=r"initial_scale: got 1.0; expected at least min_scale=2.0"
    ):
        GuardConfig(initial_scale=1.0, min_scale=2.0)


def test_each_field_of_a_guard_has_a_one_line_description() -> None:
    parsed = docstring_parser.parse(GuardConfig.__doc__ or "")
    documented = {p.arg_name: p.description for p in parsed.params}
    assert set(documented) == {field.name for field in fields(GuardConfig)}
    assert all(text and "\n" not in text for text in documented.values())
