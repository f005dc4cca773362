"""Expert parallelism: all-to-all of token rows between devices and experts."""

from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from tjx_parallel.sharding.rules import DEFAULT_RULES


def expert_all_to_all(x: jax.Array, mesh: Mesh, *, back: bool = False) -> jax.Array:
    """Exchange token rows by an all-to-all over the mesh axis "expert"; inside `jax.jit`.

    Dispatches rows to the devices of their experts, and back (Lepikhin et al., "GShard", 2020,
    section 3.2).

    Parameters
    ----------
    x
        Rows [groups, experts, capacity, width], groups sharded over data, fsdp and expert as
        batches are; with ``back`` experts sharded over expert and groups over data and fsdp.
    mesh
        The device mesh; its size along expert divides the experts.
    back
        Whether to return rows from the experts to their groups.

    Returns
    -------
    jax.Array
        The same global array with the other sharding.
    """
    around = jax.sharding.get_abstract_mesh()
    # Without data and fsdp in the spec the compiler would gather the rows over them first.
    groups = tuple(axis for axis in DEFAULT_RULES["batch"] if axis != "expert")
    spec: Any = PartitionSpec
    here, there = spec(DEFAULT_RULES["batch"]), spec(groups, "expert")

    def move(x: jax.Array) -> jax.Array:
        split, joined = (0, 1) if back else (1, 0)
        all_to_all: Any = jax.lax.all_to_all  # JAX gives no types
        moved: jax.Array = all_to_all(x, "expert", split, joined, tiled=True)
        return moved

    run = jax.shard_map(
        move,
        mesh=around if around.axis_names else mesh,
        axis_names=set(mesh.axis_names) - set(around.manual_axes),
        in_specs=(there if back else here,),
        out_specs=here if back else there,
        check_vma=False,
    )
    exchanged: jax.Array = run(x)
    return exchanged
