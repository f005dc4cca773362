"""Each optimizer equals a float64 NumPy implementation of its paper, update by update."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from optimizer_problem import (
    DECAYED,
    LARGE,
    MATRICES,
    SHAPES,
    SQUARE,
    UPDATES,
    flat,
    nest,
    problem,
    run,
    stack_axes_of,
    train,
    train_by,
    worst_difference,
)
from optimizer_reference import DIRECTIONS, Textbook

from tjx_optim import (
    OPTIMIZERS,
    OptimizerConfig,
    ScheduleConfig,
    make_optimizer,
    make_schedule,
)

# From the papers; see the table in optimizer_config.py for the sections.
PAPERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": False},
    "adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
    "lamb": {"b1": 0.9, "b2": 0.999, "eps": 1e-6},
    "lion": {"b1": 0.9, "b2": 0.99},
    "adafactor": {"b1": 0.0, "b2": 0.8, "eps": 1e-30},
    "muon": {"momentum": 0.95, "nesterov": True, "b1": 0.9, "b2": 0.95, "eps": 1e-8},
    "dion": {"momentum": 0.95, "rank_fraction": 0.25, "b1": 0.9, "b2": 0.95, "eps": 1e-8},
    "soap": {"b1": 0.95, "b2": 0.95, "eps": 1e-8, "precondition_every": 10},
    "schedule_free_adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
}
# Peaks at which a hundred updates move a parameter by about its own size.
RATES = {"lamb": 1e-2, "adafactor": 1e-2, "sgd": 1e-2}
PROBLEMS = {"soap": SQUARE, "adafactor": {**SHAPES, **LARGE}}


def test_the_reference_covers_the_whole_table() -> None:
    assert set(OPTIMIZERS) == set(DIRECTIONS) == set(PAPERS)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_hundred_updates_equal_the_reference(name: Any) -> None:
    # With stacked layers and experts, clipping, decay except of embeddings, and a schedule.
    peak, warmup = RATES.get(name, 1e-3), 9
    config = OptimizerConfig(
        name=name, clip_norm=1.0, weight_decay=0.3, decay_embeddings=False, learning_rate=peak
    )
    schedule = make_schedule(
        ScheduleConfig(name="linear", warmup_steps=warmup), learning_rate=peak, max_steps=UPDATES
    )

    def rate(step: int) -> float:
        warm = (step + 1) / (warmup + 1)
        return peak * (warm if step < warmup else 1 - 0.9 * (step - warmup) / (UPDATES - warmup))

    textbook = Textbook(name=name, settings=PAPERS[name], rate=rate, clip_norm=1.0)
    shapes = PROBLEMS.get(name, SHAPES)
    trained, evaluated = train(config, schedule=schedule, shapes=shapes)
    want = train_by(textbook, decay=dict.fromkeys(DECAYED, 0.3), shapes=shapes)
    assert worst_difference(trained, want[0]) < 1e-6
    assert worst_difference(evaluated, want[1]) < 1e-6


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("sgd", {"nesterov": True, "momentum": 0.8}),
        ("sgd", {"momentum": 0.0}),
        ("muon", {"nesterov": False, "momentum": 0.9, "b1": 0.8, "b2": 0.9, "eps": 1e-3}),
        ("muon", {"polar_express": True, "neuron_b2": 0.9}),
        ("dion", {"momentum": 0.8, "rank_fraction": 0.7, "b1": 0.8, "b2": 0.9, "eps": 1e-3}),
        ("soap", {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "precondition_every": 3}),
        ("adafactor", {"b1": 0.7, "b2": 0.6, "eps": 1e-4}),
        ("adamw", {"b1": 0.7, "b2": 0.9, "eps": 1e-3}),
        ("adam", {"b1": 0.7, "b2": 0.9, "eps": 1e-3}),
        ("lamb", {"b1": 0.7, "b2": 0.9, "eps": 1e-3}),
        ("lion", {"b1": 0.7, "b2": 0.8}),
        ("schedule_free_adamw", {"b1": 0.7, "b2": 0.9, "eps": 1e-3}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_every_setting_of_an_optimizer_has_its_effect(name: Any, changed: dict[str, Any]) -> None:
    # Without clipping, with decay of embeddings and a constant rate.
    rate = RATES.get(name, 1e-3)
    config = OptimizerConfig(
        name=name, clip_norm=None, weight_decay=0.2, learning_rate=rate, **changed
    )
    textbook = Textbook(name=name, settings={**PAPERS[name], **changed}, rate=lambda _: rate)
    decay = dict.fromkeys([*DECAYED, "wte/embedding"], 0.2)
    shapes = SQUARE if name == "soap" else SHAPES
    trained, _ = train(config, shapes=shapes)
    assert worst_difference(trained, train_by(textbook, decay=decay, shapes=shapes)[0]) < 1e-6


def test_soap_moves_all_entries_of_matrices_without_full_rank() -> None:
    # The covariances of [4, 6] and [5, 3] are singular, as are those of a gradient of zeros.
    params, gradients = problem()
    gradients[2] = jax.tree.map(np.zeros_like, gradients[2])
    config = OptimizerConfig(name="soap", weight_decay=0.0, learning_rate=1e-3)
    optimizer = make_optimizer(config, stack_axes=nest(stack_axes_of(params)))
    trained, _, _ = run(optimizer, params, gradients)
    for path in MATRICES:
        moved = np.abs(np.diff(trained[path], axis=0, prepend=params[path][None]))
        assert (moved[0] == 0).all()
        assert (moved[1:].max(0) > 1e-4).all()
        assert moved.max() < 0.1


def test_dion_recovers_from_gradients_of_zero() -> None:
    # With zero-initialized projections, a matrix has no gradient at first.
    params, gradients = problem()
    gradients[0] = jax.tree.map(np.zeros_like, gradients[0])
    config = OptimizerConfig(name="dion", weight_decay=0.0, learning_rate=1e-3, clip_norm=None)
    optimizer = make_optimizer(config, stack_axes=nest(stack_axes_of(params)))
    trained, _, _ = run(optimizer, params, gradients[:3])
    for path in MATRICES:
        moved = np.diff(trained[path], axis=0, prepend=params[path][None])
        assert (moved[0] == 0).all()
        np.testing.assert_allclose(np.sqrt((moved[1:] ** 2).mean((-2, -1))), 2e-4, rtol=1e-3)


def test_moments_are_those_of_the_clipped_gradient() -> None:
    # With clipping after Adam, the first gradient would dominate the second moment for long.
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, clip_norm=1.0, b2=0.999)
    params = {"head/kernel": np.zeros((2, 2), np.float32)}
    gradients = [{"head/kernel": np.full((2, 2), 0.1, np.float32)} for _ in range(UPDATES)]
    gradients[0] = {"head/kernel": np.full((2, 2), 1e6, np.float32)}
    path = run(make_optimizer(config), params, gradients)[0]["head/kernel"]
    assert (np.diff(path[50:, 0, 0]) < -5e-3).all()


def test_only_the_decaying_parameters_shrink_when_there_is_no_gradient() -> None:
    params, gradients = problem()
    zeros = [jax.tree.map(np.zeros_like, gradient) for gradient in gradients]
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, decay_embeddings=False)
    got, _, _ = run(make_optimizer(config), params, zeros)
    for path, before in params.items():
        if path in DECAYED:
            np.testing.assert_allclose(got[path][-1], before * 0.95**UPDATES, rtol=1e-5)
        else:
            np.testing.assert_array_equal(got[path][-1], before)


def test_cautious_decay_leaves_out_entries_that_the_update_moves_away_from_zero() -> None:
    params, gradients = problem()

    def after_one_step(**options: Any) -> dict[str, Any]:
        config = OptimizerConfig(learning_rate=0.01, **options)
        found: dict[str, Any] = run(make_optimizer(config), params, gradients[:1])[0]
        return found

    none, all_entries = after_one_step(weight_decay=0.0), after_one_step(weight_decay=0.5)
    cautious = after_one_step(weight_decay=0.5, cautious_decay=True)
    for path, before in params.items():
        shrinks = (before - none[path][0]) * before >= 0
        expected = np.where(shrinks, all_entries[path][0], none[path][0])
        np.testing.assert_array_equal(cautious[path][0], expected, err_msg=path)
    kernel = params["blocks/dense/kernel"]
    assert 0.2 < np.mean((kernel - none["blocks/dense/kernel"][0]) * kernel > 0) < 0.8


# How many arrays of a parameter's own shape an optimizer keeps for each kernel of a layer.
MOMENTS = {
    "sgd": 1, "adam": 2, "adamw": 2, "lamb": 2, "lion": 1, "adafactor": 1, "muon": 1,
    "dion": 1, "soap": 2, "schedule_free_adamw": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_moments_have_the_paths_of_their_parameters(name: Any) -> None:
    # The sharding of the state relies on this: a leaf has the sharding of its parameter.
    params = {path: np.zeros(shape, np.float32) for path, shape in SHAPES.items()}
    optimizer = make_optimizer(OptimizerConfig(name=name), stack_axes=nest(stack_axes_of(params)))
    state = flat(jax.eval_shape(optimizer.init, nest(params)))
    of_no_parameter = {
        path: leaf.shape
        for path, leaf in state.items()
        if not any(path.endswith(f"/{parameter}") for parameter in SHAPES)
    }
    assert set(of_no_parameter.values()) <= {()}
    kernels = [p for p in state if p.endswith("/blocks/dense/kernel")]
    of_its_shape = [p for p in kernels if state[p].shape == SHAPES["blocks/dense/kernel"]]
    assert len(of_its_shape) == MOMENTS[name]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "soap", "schedule_free_adamw"])
def test_new_values_do_not_recompile(name: Any) -> None:
    params, gradients = problem()
    optimizer = make_optimizer(
        OptimizerConfig(name=name), lambda count: 1e-3 / (count + 1),
        stack_axes=nest(stack_axes_of(params)),
    )  # fmt: skip
    update: Any = jax.jit(optimizer.update)
    nested = jax.device_put(nest(params))
    state = jax.jit(optimizer.init)(nested)
    for gradient in gradients[:3]:
        _, state = update(jax.device_put(nest(gradient)), state, nested)
    assert update._cache_size() == 1


def test_narrow_parameters_raise_with_their_path() -> None:
    params = {"head": {"kernel": np.zeros((2, 2), np.float16)}, "norm": {"scale": np.ones(2, "f")}}
    with pytest.raises(
        ValueError, match=r"got 1 narrower than float32, such as head/kernel \(float16\)"
    ):
        make_optimizer(OptimizerConfig()).init(params)


def test_trees_unlike_the_parameters_raise() -> None:
    params = {"head": {"kernel": np.ones((2, 2), "f"), "bias": np.ones(2, "f")}}
    optimizer = make_optimizer(
        OptimizerConfig(),
        learning_rate_scales={"head": {"kernel": 1.0}},
        stack_axes={"head": {"kernel": 0, "bias": 0, "other": 0}},
    )
    message = r"learning_rate_scales: got 1 paths .* such as head/bias.*\nstack_axes: .*head/other"
    with pytest.raises(ValueError, match=message):
        optimizer.init(params)
    too_deep = make_optimizer(OptimizerConfig(), stack_axes={"head": {"kernel": 0, "bias": 2}})
    with pytest.raises(ValueError, match=re.escape("got 2 for head/bias of shape (2,)")):
        too_deep.init(params)
