"""Embedding lookup: its gradient against a float64 sum, also on the GPU path."""

import re
from typing import Any

import jax
import numpy as np
import pytest

from tjx_kernels import embedding_lookup
from tjx_kernels.embedding import BLOCK, sum_by_id


# Fewer rows than a block; one more than a block; ids that span many blocks; three levels.
@pytest.mark.parametrize(
    ("size", "used"), [(0, 5), (1, 5), (BLOCK + 1, 2), (3 * BLOCK, 300), (BLOCK**2 + 1, 3)]
)
def test_rows_are_summed_by_id(size: int, used: int) -> None:
    count = max(used, 7)
    rng = np.random.default_rng(size)
    ids = rng.integers(0, used, size, np.int32)
    rows = rng.standard_normal((size, 3)).astype(np.float32)
    found = jax.jit(sum_by_id, static_argnums=2)(*jax.device_put((ids, rows)), count)
    expected, scale = np.zeros((count, 3)), np.zeros((count, 3))
    np.add.at(expected, ids, rows.astype(np.float64))
    np.add.at(scale, ids, np.abs(rows))
    assert found.dtype == np.float32
    assert np.all(np.abs(np.asarray(found) - expected) <= 1e-6 * scale)


def test_sums_of_bfloat16_rows_are_float32() -> None:
    rows = jax.device_put(np.ones((4096, 2), "bfloat16"))
    found = jax.jit(sum_by_id, static_argnums=2)(jax.device_put(np.zeros(4096, np.int32)), rows, 2)
    np.testing.assert_array_equal(np.asarray(found), [[4096, 4096], [0, 0]])


def test_lookup_clips_ids_and_so_does_its_gradient() -> None:
    table = jax.device_put(np.arange(6, dtype=np.float32).reshape(3, 2))
    ids = jax.device_put(np.array([[-1, 0], [2, 9]], np.int32))

    def both(table: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = embedding_lookup(table, ids)
        return found, jax.grad(lambda table: embedding_lookup(table, ids).sum())(table)

    found, gradient = jax.device_get(jax.jit(both)(table))
    np.testing.assert_array_equal(found, [[[0, 1], [0, 1]], [[4, 5], [4, 5]]])
    np.testing.assert_array_equal(gradient, [[2, 2], [0, 0], [2, 2]])


def test_gpus_get_no_scatter_add() -> None:
    """Other platforms keep theirs: it is ordered there, and faster than sorting."""

    def gradient(table: Any, ids: Any) -> Any:
        return jax.grad(lambda table: embedding_lookup(table, ids).sum())(table)

    abstract: Any = jax.ShapeDtypeStruct  # JAX gives no types
    traced = jax.jit(gradient).trace(abstract((9, 2), "float32"), abstract((300,), "int32"))
    unique = {}
    for platform in ("cuda", "cpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        unique[platform] = re.findall(r"unique_indices = (\w+)", text)
    assert set(unique["cuda"]) == {"true"}
    assert unique["cpu"] == ["false"]
