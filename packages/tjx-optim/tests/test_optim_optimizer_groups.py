"""Parameter groups: parsing, precedence, frozen parameters and unused groups."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from optimizer_problem import (
    DECAYED,
    SHAPES,
    flat,
    nest,
    problem,
    run,
    stack_axes_of,
    train,
    train_by,
    worst_difference,
)
from optimizer_reference import Textbook, split

from tjx_optim import OptimizerConfig, make_optimizer
from tjx_optim.param_groups import parse_group

GROUPS = (
    "blocks/experts/*: learning_rate_scale=0.5 weight_decay=0",
    "*/bias: weight_decay=0.4",
    "blocks/*: learning_rate_scale=0.25",
)
# The settings of these groups by hand: the first applies to the expert's bias.
SCALES = {"blocks/experts/kernel": 0.5, "blocks/experts/bias": 0.5, "blocks/dense/kernel": 0.25,
          "blocks/norm/scale": 0.25}  # fmt: skip
DECAY = {"blocks/dense/kernel": 0.1, "blocks/dense/bias": 0.4, "tower/kernel": 0.1,
         "head/kernel": 0.1, "wte/embedding": 0.1}  # fmt: skip

NUMBERS = {
    "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
    "schedule_free_adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
    "muon": {"momentum": 0.95, "nesterov": True, "b1": 0.9, "b2": 0.95, "eps": 1e-8},
}


@pytest.mark.parametrize("name", ["adamw", "schedule_free_adamw"])
def test_groups_and_factors_equal_the_reference(name: Any) -> None:
    mup = {path: 1 / 4 if path.endswith("kernel") else 1.0 for path in SHAPES}
    together = {path: SCALES.get(path, 1.0) * factor for path, factor in mup.items()}
    config = OptimizerConfig(name=name, groups=GROUPS, weight_decay=0.1, learning_rate=2e-3)
    textbook = Textbook(name=name, settings=NUMBERS[name], rate=lambda _: 2e-3, clip_norm=1.0)
    trained, evaluated = train(config, learning_rate_scales=mup)
    want, want_evaluated = train_by(textbook, decay=DECAY, rate_scale=together)
    assert worst_difference(trained, want) < 1e-6
    assert worst_difference(evaluated, want_evaluated) < 1e-6


FROZEN = ("wte/embedding", "blocks/dense/bias", "blocks/dense/kernel")


@pytest.mark.parametrize("name", ["adamw", "schedule_free_adamw", "muon"])
def test_frozen_parameters_have_no_updates_no_state_and_no_part_in_the_norm(name: Any) -> None:
    mean: dict[str, Any] = {} if name == "schedule_free_adamw" else {"ema_decay": 0.9}
    config = OptimizerConfig(
        name=name, groups=("wte/*: frozen", "blocks/dense/*: frozen"), weight_decay=0.1,
        learning_rate=1e-3, **mean,
    )  # fmt: skip
    params, gradients = problem()
    stack_axes = stack_axes_of(params)
    optimizer = make_optimizer(config, stack_axes=nest(stack_axes))
    trained, evaluated, state = run(optimizer, params, gradients)

    for path in FROZEN:
        for history in (trained[path], evaluated[path]):
            np.testing.assert_array_equal(history, np.broadcast_to(params[path], history.shape))
        assert not any(each.endswith(path) for each in flat(state))

    textbook = Textbook(
        name=name, settings=NUMBERS[name], rate=lambda _: 1e-3, clip_norm=1.0, **mean
    )
    rest = {path: leaf for path, leaf in params.items() if path not in FROZEN}
    of_rest = [{path: gradient[path] for path in rest} for gradient in gradients]
    layers = split(
        rest, stack_axes, decay=dict.fromkeys(DECAYED, 0.1),
        is_matrix={"blocks/experts/kernel": True, "tower/kernel": True},
    )  # fmt: skip
    want, want_evaluated = textbook.train(layers, of_rest)
    assert worst_difference({path: trained[path] for path in rest}, want) < 1e-6
    assert worst_difference({path: evaluated[path] for path in rest}, want_evaluated) < 1e-6


def test_without_frozen_parameters_the_state_has_no_partition() -> None:
    params = {path: np.zeros(shape, np.float32) for path, shape in SHAPES.items()}
    trees: list[Any] = [
        jax.tree.structure(
            jax.eval_shape(make_optimizer(OptimizerConfig(groups=groups)).init, nest(params))
        )
        for groups in ((), ("*/bias: weight_decay=0.1",))
    ]
    assert trees[0] == trees[1]
    assert "Masked" not in str(trees[0])


def test_unused_groups_raise_with_the_nearest_paths() -> None:
    params = nest({path: np.zeros(shape, np.float32) for path, shape in SHAPES.items()})
    groups = ("wte/embeding: frozen", "*/kernel: weight_decay=0", "head/kernel: frozen")
    with pytest.raises(
        ValueError, match=r"'wte/embeding', which matches no parameter.*wte/embedding"
    ) as e:
        make_optimizer(OptimizerConfig(groups=groups)).init(params)
    assert "'head/kernel', whose parameters all belong to earlier groups" in str(e.value)
    assert len(str(e.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wte/*", "expected a path pattern, a colon and 1 to 3 settings"),
        (": frozen", "expected a path pattern, a colon and 1 to 3 settings"),
        ("a: " + "x " * 9999, "expected a path pattern, a colon and 1 to 3 settings"),
        ("a: " + "x" * 9999, "got 'x{200}' in 'a: x{197}'; expected frozen"),
        ("a: learning_rate=2", "got 'learning_rate=2' in .*; did you mean learning_rate_scale"),
        ("a: lr=2", "got 'lr=2' in .*; expected frozen, learning_rate_scale"),
        ("a: frozen=yes", "got 'frozen=yes' in .*; did you mean frozen"),
        ("a: weight_decay=much", "weight_decay=much in .* expected a finite number of at least 0"),
        ("a: weight_decay=-1", "weight_decay=-1 in .* expected"),
        ("a: learning_rate_scale=0", "above 0; write frozen"),
        ("a: learning_rate_scale=inf", "learning_rate_scale=inf in .* expected"),
        ("a: weight_decay=0 weight_decay=1", "got weight_decay twice"),
        ("a: frozen weight_decay=1", "expected frozen alone"),
    ],
)
def test_invalid_groups_raise(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_group(text)
    with pytest.raises(ValueError, match="groups: .*" + message):
        OptimizerConfig(groups=(text,))


def test_a_duplicate_pattern_raises() -> None:
    with pytest.raises(ValueError, match=r"groups: got the pattern 'a/\*' twice"):
        OptimizerConfig(groups=("a/*: frozen", "a/*: weight_decay=0"))


@pytest.mark.parametrize("name", ["adamw", "lamb", "schedule_free_adamw"])
def test_scales_of_epsilon_and_of_weight_decay(name: str) -> None:
    """A parameter with scales is updated as one with these values and without scales."""
    eps, decay = 0.1, 0.2
    scaled = OptimizerConfig(
        name=name, learning_rate=0.01, eps=eps, weight_decay=decay, clip_norm=None
    )
    plain = replace(scaled, eps=eps / 4, weight_decay=decay * 3)
    params, gradients = problem({"dense/kernel": (4, 3)})
    trees: Any = {
        "weight_decay_scales": nest({"dense/kernel": 3.0}),
        "eps_scales": nest({"dense/kernel": 0.25}),
    }
    got, _, _ = run(make_optimizer(scaled, **trees), params, gradients[:5])
    want, _, _ = run(make_optimizer(plain), params, gradients[:5])
    unscaled, _, _ = run(make_optimizer(scaled), params, gradients[:5])
    np.testing.assert_allclose(got["dense/kernel"], want["dense/kernel"], rtol=1e-5)
    assert np.abs(got["dense/kernel"] - unscaled["dense/kernel"]).max() > 1e-3
