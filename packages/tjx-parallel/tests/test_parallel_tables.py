"""Sharded embedding lookup: the gradient is summed over devices."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tjx_parallel import MeshConfig, ShardingRules, batch_sharding, look_up, make_mesh


@pytest.mark.parametrize("sizes", [{"data": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_a_custom_lookup_has_the_gradient_of_take(sizes: Any) -> None:
    choices = MeshConfig(**sizes)
    mesh = make_mesh(choices, jax.devices()[:4])
    rules = ShardingRules.of(choices)
    rng = np.random.default_rng(0)
    table = jax.device_put(rng.standard_normal((8, 4)).astype(np.float32))
    ids = jax.device_put(rng.integers(0, 8, (4, 6), np.int32), batch_sharding(mesh))
    weight = jax.device_put(rng.standard_normal((4, 6, 4)).astype(np.float32))
    own = partial(look_up, mesh=mesh, rules=rules, row_axis="vocab", take=partial(jnp.take, axis=0))

    @partial(jax.jit, static_argnames="alone")
    def gradient(table: Any, ids: Any, *, alone: bool) -> Any:
        take = own if alone else partial(jnp.take, axis=0)
        return jax.grad(lambda table: (take(table, ids) * weight).sum())(table)

    with jax.transfer_guard("allow"):
        found, expected = (jax.device_get(gradient(table, ids, alone=a)) for a in (True, False))
    np.testing.assert_allclose(found, expected, atol=1e-6)
