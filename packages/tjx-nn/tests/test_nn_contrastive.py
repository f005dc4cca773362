"""InfoNCE against its definition."""

import jax
import numpy as np
import pytest

from tjx_nn import info_nce

RNG = np.random.default_rng(0)
QUERIES, KEYS = RNG.standard_normal((2, 5, 3)).astype(np.float32)


def by_definition(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    rows = []
    for n, query in enumerate(queries):
        cosines = [query @ key / np.linalg.norm(query) / np.linalg.norm(key) for key in keys]
        rows.append(-np.log(np.exp(cosines[n] / 0.2) / np.exp(np.array(cosines) / 0.2).sum()))
    return np.array(rows)


def test_info_nce_equals_its_definition() -> None:
    both = jax.device_put((QUERIES, KEYS))
    one_sided = by_definition(QUERIES, KEYS)
    losses = jax.jit(lambda q, k: info_nce(q, k, temperature=0.2))(*both)
    np.testing.assert_allclose(jax.device_get(losses), one_sided, rtol=1e-4)
    losses = jax.jit(lambda q, k: info_nce(q, k, temperature=0.2, symmetric=True))(*both)
    symmetric = (one_sided + by_definition(KEYS, QUERIES)) / 2
    np.testing.assert_allclose(jax.device_get(losses), symmetric, rtol=1e-4)


def test_rows_of_zeros_have_finite_gradients() -> None:
    queries = QUERIES.copy()
    queries[2] = 0
    gradient = jax.jit(jax.grad(lambda q, k: info_nce(q, k).sum()))(
        *jax.device_put((queries, KEYS))
    )
    assert np.isfinite(jax.device_get(gradient)).all()


def test_other_shapes_are_rejected() -> None:
    with pytest.raises(ValueError, match="expected equal shapes"):
        info_nce(*jax.device_put((QUERIES, KEYS[:4])))
