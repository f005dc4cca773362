"""Sharding constraints of activations by logical axes."""

from collections.abc import Callable, Collection, Sequence

import jax
from jax.sharding import Mesh, NamedSharding

from tjx_parallel.sharding.rules import ShardingRules


def make_constraint(
    mesh: Mesh, rules: ShardingRules, *, without: Collection[str] = ()
) -> Callable[[jax.Array, Sequence[str | None]], jax.Array]:
    """Return ``constrain(x, logical_axes) -> x``, a sharding constraint inside `jax.jit`.

    Without constraints the compiler may shard the width of the residual stream over fsdp instead of
    gathering the weights.

    Parameters
    ----------
    mesh
        The device mesh.
    rules
        Rules from logical to mesh axes, the same as for the parameters.
    without
        Mesh axes to ignore, as for `ShardingRules.spec`.

    Returns
    -------
    Callable
        Does not change values. Inside `jax.shard_map` over some axes it constrains the local shard
        over the other axes. Raises ValueError if the mesh does not divide a dimension.
    """

    def constrain(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
        around = jax.sharding.get_abstract_mesh()
        # x is a local shard along manual axes.
        left_out = {*without, *around.manual_axes}
        spec = rules.spec(mesh, logical_axes, x.shape, name="activation", without=left_out)
        sharding = spec if around.axis_names else NamedSharding(mesh, spec)
        constrained: jax.Array = jax.lax.with_sharding_constraint(x, sharding)  # type: ignore[no-untyped-call]  # JAX gives no types
        return constrained

    return constrain
