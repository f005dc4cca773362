"""Gradient clipping: per layer of a stack, and in the documented order."""

from typing import Any

import pytest
from optimizer_problem import train, train_by, worst_difference
from optimizer_reference import Textbook

from tjx_optim import OptimizerConfig

BOUNDS = {"clip_value": 0.05, "clip_adaptive": 0.02, "clip_norm": 0.02}
PLAIN: dict[str, Any] = {"name": "sgd", "settings": {"momentum": 0.0, "nesterov": False}}


@pytest.mark.parametrize("bounds", [["clip_value"], ["clip_adaptive"], list(BOUNDS)])
def test_clipping_equals_the_reference(bounds: list[str]) -> None:
    # Plain gradient descent compares the clipped gradient itself.
    given: dict[str, Any] = {"clip_norm": None, **{name: BOUNDS[name] for name in bounds}}
    config = OptimizerConfig(name="sgd", momentum=0.0, weight_decay=0.0, learning_rate=0.1, **given)
    trained, _ = train(config)
    want, _ = train_by(Textbook(rate=lambda _: 0.1, **PLAIN, **given))
    assert worst_difference(trained, want) < 1e-6
    # Each limit is active: without any of them the parameters differ.
    for name in bounds:
        loose, _ = train_by(Textbook(rate=lambda _: 0.1, **PLAIN, **{**given, name: None}))
        assert worst_difference(trained, loose) > 1e-3
