"""Moments stored in bfloat16 and computed in float32."""

from typing import Any

import jax
import numpy as np
import pytest
from optimizer_problem import SHAPES, all_differences, flat, nest, stack_axes_of, train, train_by
from optimizer_reference import Textbook, keep_eight_bits

from tjx_optim import OptimizerConfig, make_optimizer

NUMBERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": False},
    "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
    "lion": {"b1": 0.9, "b2": 0.99},
    "muon": {"momentum": 0.95, "nesterov": True, "b1": 0.9, "b2": 0.95, "eps": 1e-8},
    "schedule_free_adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
}


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_moments_equal_the_reference_with_eight_significant_bits(name: Any) -> None:
    config = OptimizerConfig(
        name=name, moment_dtype="bfloat16", weight_decay=0.0, learning_rate=1e-3
    )
    textbook = Textbook(name=name, settings=NUMBERS[name], rate=lambda _: 1e-3, clip_norm=1.0)
    trained, _ = train(config)
    rounded, _ = train_by(textbook, store=dict.fromkeys(SHAPES, keep_eight_bits))
    exact, _ = train_by(textbook)
    # If float32 and float64 round a tie differently, a moment differs in its last bit. Such
    # entries are rare; entries that rounding changes are not.
    assert np.quantile(all_differences(trained, rounded), 0.99) < 5e-7
    assert np.quantile(all_differences(trained, exact), 0.99) > 1e-5


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_only_moments_are_narrow(name: Any) -> None:
    mean: dict[str, Any] = {} if name == "schedule_free_adamw" else {"ema_decay": 0.9}
    params = nest({path: np.zeros(shape, np.float32) for path, shape in SHAPES.items()})
    optimizer = make_optimizer(
        OptimizerConfig(name=name, moment_dtype="bfloat16", **mean),
        stack_axes=nest(stack_axes_of(SHAPES)),
    )
    state = flat(jax.eval_shape(optimizer.init, params))
    kernels = {p: leaf.dtype for p, leaf in state.items() if p.endswith("blocks/dense/kernel")}
    wide = [path for path, dtype in kernels.items() if dtype == np.float32]
    assert len(wide) == 1  # the mean, or schedule-free's z
    assert wide[0].split("/")[1] in {"average", "z"}
    assert {str(dtype) for dtype in kernels.values()} == {"bfloat16", "float32"}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"name": "adam"}, "b2=0.999"),
        ({"name": "lamb"}, "b2=0.999"),
        ({"name": "adamw", "b2": 0.997}, "b2=0.997"),
        ({"name": "sgd", "momentum": 0.999}, "momentum=0.999"),
        ({"name": "adafactor"}, "adafactor's second moment"),
    ],
)
def test_moments_that_bfloat16_would_not_update_raise(given: Any, field: str) -> None:
    with pytest.raises(
        ValueError, match=f"moment_dtype: got 'bfloat16'; expected float32.*{field}"
    ):
        OptimizerConfig(moment_dtype="bfloat16", **given)
    OptimizerConfig(moment_dtype="bfloat16", name="adamw", b2=0.995)
