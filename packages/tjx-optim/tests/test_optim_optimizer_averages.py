"""Moving average of the parameters: exact from the first update on, found in any state."""

from typing import Any

import jax
import numpy as np
import pytest
from optimizer_problem import nest, problem, run, train, train_by, worst_difference
from optimizer_reference import Textbook

from tjx_optim import OptimizerConfig, evaluation_params, make_optimizer


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_the_average_equals_the_weighted_sum_of_all_past_parameters(decay: float) -> None:
    config = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, clip_norm=None, ema_decay=decay)
    textbook = Textbook(
        name="adamw",
        settings={"b1": 0.9, "b2": 0.95, "eps": 1e-8},
        rate=lambda _: 1e-3,
        ema_decay=decay,
    )
    _, evaluated = train(config)
    assert worst_difference(evaluated, train_by(textbook)[1]) < 1e-6


def test_the_average_of_constant_parameters_is_exact() -> None:
    # With a bias correction in float32, ones become 0.9998 after the first update.
    params = {"norm/scale": np.ones(3, np.float32)}
    zeros = [{"norm/scale": np.zeros(3, np.float32)}] * 5
    _, evaluated, _ = run(make_optimizer(OptimizerConfig(ema_decay=0.9999)), params, zeros)
    np.testing.assert_allclose(evaluated["norm/scale"], 1.0, rtol=2e-7)


def test_without_an_average_the_parameters_are_evaluated() -> None:
    params, _ = problem()
    optimizer = make_optimizer(OptimizerConfig())
    state = jax.jit(optimizer.init)(jax.device_put(nest(params)))
    nested = jax.device_put(nest(params))
    assert evaluation_params(state, nested) is nested


@pytest.mark.parametrize("given", [{"name": "schedule_free_adamw"}, {"ema_decay": 0.5}])
def test_the_average_is_found_in_a_restored_larger_state(given: Any) -> None:
    params, gradients = problem()
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, **given))
    trained, evaluated, state = run(optimizer, params, gradients)
    # As in a checkpoint: leaves are saved and restored into the tree of a new state.
    like = jax.eval_shape(optimizer.init, nest(params))
    leaves = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    restored = {"guard": 0, "optimizer": jax.tree.unflatten(jax.tree.structure(like), leaves)}
    last = nest({path: history[-1] for path, history in trained.items()})

    got = jax.jit(evaluation_params)(*jax.device_put((restored, last)))

    for path, history in evaluated.items():
        leaf = got
        for part in path.split("/"):
            leaf = leaf[part]
        np.testing.assert_allclose(leaf, history[-1], rtol=1e-6, atol=1e-7)
        assert np.abs(history[-1] - trained[path][-1]).max() > 1e-3


def test_before_the_first_update_the_average_is_the_parameters() -> None:
    params = jax.device_put(nest(problem()[0]))
    for config in (OptimizerConfig(ema_decay=0.9), OptimizerConfig(name="schedule_free_adamw")):
        state = jax.jit(make_optimizer(config).init)(params)
        got = jax.jit(evaluation_params)(state, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            *jax.device_get((got, params)),
        )


def test_two_averages_raise() -> None:
    params = jax.device_put(nest(problem()[0]))
    state = jax.jit(make_optimizer(OptimizerConfig(ema_decay=0.9)).init)(params)
    with pytest.raises(ValueError, match="got 2 averages of the parameters"):
        evaluation_params((state, state), params)
