"""Muon: orthogonalized updates, and the choice of matrices."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_optim import OptimizerConfig, make_optimizer
from tjx_optim.matrix_optimizers.muon import POLAR_EXPRESS, orthogonalize


@settings(max_examples=10)
@given(
    shape=st.sampled_from([(4, 4), (3, 7), (9, 2), (2, 5, 3), (2, 3, 4, 4)]),
    seed=st.integers(0, 99),
    size=st.floats(1e-3, 1e3),
)
def test_singular_values_move_near_one_and_vectors_are_kept(
    shape: tuple[int, ...], seed: int, size: float
) -> None:
    rng = np.random.default_rng(seed)
    short = min(shape[-2:])
    u = np.linalg.qr(rng.normal(size=(*shape[:-1], short)))[0]
    v = np.linalg.qr(rng.normal(size=(*shape[:-2], shape[-1], short)))[0]
    values = rng.uniform(0.05, 1.0, (*shape[:-2], 1, short)) * size
    matrices = (u * values) @ v.swapaxes(-1, -2)

    got = np.asarray(jax.jit(orthogonalize)(jax.device_put(matrices.astype(np.float32))))

    middle = u.swapaxes(-1, -2) @ got @ v
    diagonal = np.diagonal(middle, axis1=-2, axis2=-1)
    assert (diagonal > 0.6).all()
    assert (diagonal < 1.3).all()
    np.testing.assert_allclose(u * diagonal[..., None, :] @ v.swapaxes(-1, -2), got, atol=1e-4)


def test_polar_express_is_optimal_after_each_polynomial() -> None:
    # The optimal odd polynomial for an interval maps it to one symmetric around 1.
    values = np.logspace(-3, 0, 100_001)
    for a, b, c in POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
        assert 1 - values.min() == pytest.approx(values.max() - 1, rel=1e-4)
    matrix = np.diag([1.0, 0.3, 0.01, 2e-3]).astype(np.float32)
    flat = jax.jit(lambda x: orthogonalize(x, POLAR_EXPRESS))(jax.device_put(matrix))
    assert (abs(np.diag(np.asarray(flat)) - 1) < 0.125).all()


def test_a_zero_matrix_stays_zero() -> None:
    zeros = jax.device_put(np.zeros((2, 3, 4), np.float32))
    np.testing.assert_array_equal(jax.jit(orthogonalize)(zeros), np.zeros((2, 3, 4)))


def test_a_kernel_with_three_axes_raises() -> None:
    params = {"blocks": {"qkv": {"kernel": np.zeros((2, 4, 6), np.float32)}}}
    with pytest.raises(
        ValueError, match=r"blocks/qkv/kernel of shape \(2, 4, 6\) for muon; expected two"
    ):
        make_optimizer(OptimizerConfig(name="muon")).init(params)
    stacked = make_optimizer(
        OptimizerConfig(name="muon"), stack_axes={"blocks": {"qkv": {"kernel": 1}}}
    )
    jax.eval_shape(stacked.init, params)
    # Frozen parameters are not checked.
    frozen = make_optimizer(OptimizerConfig(name="muon", groups=("*/kernel: frozen",)))
    jax.eval_shape(frozen.init, params)


def test_parameters_without_a_hidden_matrix_raise() -> None:
    params = {"wte": {"embedding": np.zeros((4, 6), np.float32)}, "x": np.zeros((4, 4), np.float32)}
    with pytest.raises(ValueError, match="got muon for 2 parameters, such as wte/embedding; exp"):
        make_optimizer(OptimizerConfig(name="muon")).init(params)
    mask = {"wte": {"embedding": False}, "x": True}
    jax.eval_shape(make_optimizer(OptimizerConfig(name="muon"), muon_mask=mask).init, params)


def test_updates_of_matrices_have_the_rms_of_adamw_updates() -> None:
    # Liu et al. 2025: 0.2 to 0.4 of the rate, for any shape.
    rng = np.random.default_rng(0)
    shapes = {"tall": (64, 8), "wide": (8, 64), "square": (24, 24)}
    params = {name: {"kernel": np.zeros(shape, np.float32)} for name, shape in shapes.items()}
    gradient = {
        name: {"kernel": rng.normal(size=shape).astype(np.float32)}
        for name, shape in shapes.items()
    }
    optimizer = make_optimizer(OptimizerConfig(name="muon", learning_rate=1.0))

    @jax.jit
    def first_update(params: Any, gradient: Any) -> Any:
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    updates = jax.device_get(first_update(*jax.device_put((params, gradient))))
    for name in shapes:
        assert 0.15 < np.sqrt((updates[name]["kernel"] ** 2).mean()) < 0.25
