"""How a model, which names no mesh axis, tells the compiler where its activations lie."""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding

from tjx_parallel.rules import ShardingRules


def make_constraint(
    mesh: Mesh, rules: ShardingRules
) -> Callable[[jax.Array, Sequence[str | None]], jax.Array]:
    """Return ``constrain(x, logical_axes) -> x``, to be called inside `jax.jit`.

    Without constraints the compiler guesses, and may spread a residual stream over fsdp by its
    width instead of gathering the weights. Two kinds of place need one: the residual stream,
    ``constrain(x, ("batch", "seq", "embed"))``, where the sequences take fsdp before the width can;
    and an embedding table before the look-up, ``constrain(table, ("vocab", None))``, which gathers
    its width.

    Parameters
    ----------
    mesh
        The mesh.
    rules
        The table from logical to mesh axes, the same as for the parameters.

    Returns
    -------
    Callable
        Changes no value. Raises ValueError if the mesh does not divide a dimension.
    """

    def constrain(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
        spec = rules.spec(mesh, logical_axes, x.shape, name="activation")
        constrained: jax.Array = jax.lax.with_sharding_constraint(  # type: ignore[no-untyped-call]  # JAX gives no types
            x, NamedSharding(mesh, spec)
        )
        return constrained

    return constrain
