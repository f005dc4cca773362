"""Global norms and norms per layer."""

from typing import Any

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_optim import global_norm, layer_norms


@given(st.integers(0, 2**16))
@settings(max_examples=10)
def test_global_norm_is_the_norm_of_all_leaves_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tree = {"a": rng.normal(size=(3, 4)), "b": {"c": rng.normal(size=5), "d": rng.normal(size=())}}
    want = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(tree)))

    got = jax.jit(global_norm)(jax.device_put(jax.tree.map(np.float32, tree)))

    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-6)


def test_global_norm_squares_in_float32() -> None:
    # 300^2 overflows float16, whose largest number is 65504.
    got = jax.jit(global_norm)(jax.device_put({"a": np.full(4, 300.0, np.float16)}))
    assert float(got) == 600.0


def test_stacked_layers_have_the_norms_of_separate_layers() -> None:
    rng = np.random.default_rng(0)
    stacked: Any = {
        "kernel": rng.normal(size=(3, 4, 5)).astype("f"),
        "experts": {"kernel": rng.normal(size=(3, 2, 4, 5)).astype("f")},
        "embedding": rng.normal(size=(7, 4)).astype("f"),
    }
    depths = {"kernel": 1, "experts": {"kernel": 2}, "embedding": 0}

    got = jax.device_get(jax.jit(lambda tree: layer_norms(tree, depths))(jax.device_put(stacked)))

    assert set(got) == {"kernel", "experts/kernel", "embedding"}
    want: Any = [np.linalg.norm(layer) for layer in stacked["kernel"]]
    np.testing.assert_allclose(got["kernel"], want, rtol=1e-6)
    want = [[np.linalg.norm(each) for each in layer] for layer in stacked["experts"]["kernel"]]
    np.testing.assert_allclose(got["experts/kernel"], want, rtol=1e-6)
    np.testing.assert_allclose(got["embedding"], np.linalg.norm(stacked["embedding"]), rtol=1e-6)


def test_the_norms_of_all_layers_make_the_global_norm() -> None:
    tree = jax.device_put({"a": np.full((2, 3), 2.0, "f"), "b": np.full((4,), 3.0, "f")})
    parts = jax.device_get(jax.jit(lambda tree: layer_norms(tree, {"a": 1, "b": 0}))(tree))
    whole = float(jax.jit(global_norm)(tree))
    np.testing.assert_allclose(
        np.sqrt(sum((np.square(each)).sum() for each in parts.values())), whole, rtol=1e-6
    )
