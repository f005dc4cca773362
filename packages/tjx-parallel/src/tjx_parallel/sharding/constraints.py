"""How a model, which names no mesh axis, tells the compiler where its arrays lie."""

from collections.abc import Callable, Collection, Sequence

import jax
from jax.sharding import Mesh, NamedSharding

from tjx_parallel.sharding.rules import ShardingRules


def make_constraint(
    mesh: Mesh, rules: ShardingRules, *, without: Collection[str] = ()
) -> Callable[[jax.Array, Sequence[str | None]], jax.Array]:
    """Return ``constrain(x, logical_axes) -> x``, to be called inside `jax.jit`.

    Without constraints the compiler guesses, and may spread a residual stream over fsdp by its
    width instead of gathering the weights.

    Parameters
    ----------
    mesh
        The mesh.
    rules
        The table from logical to mesh axes, the same as for the parameters.
    without
        Mesh axes that are left out, as for `ShardingRules.spec`.

    Returns
    -------
    Callable
        Changes no value. Within `jax.shard_map` over some of the axes it says how the part there
        lies over the others. Raises ValueError if the mesh does not divide a dimension.
    """

    def constrain(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
        around = jax.sharding.get_abstract_mesh()
        # Over an axis that is manual here, x is a part already.
        left_out = {*without, *around.manual_axes}
        spec = rules.spec(mesh, logical_axes, x.shape, name="activation", without=left_out)
        sharding = spec if around.axis_names else NamedSharding(mesh, spec)
        constrained: jax.Array = jax.lax.with_sharding_constraint(x, sharding)  # type: ignore[no-untyped-call]  # JAX gives no types
        return constrained

    return constrain
