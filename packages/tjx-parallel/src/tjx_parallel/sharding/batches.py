"""Global batches from the rows that each process has loaded."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tjx_parallel.sharding.rules import DEFAULT_RULES

_BATCH_AXES = DEFAULT_RULES["batch"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch [rows, ...]: rows over data, fsdp and expert.

    Parameters
    ----------
    mesh
        The device mesh.

    Returns
    -------
    NamedSharding
        The sharding.
    """
    spec = PartitionSpec(_BATCH_AXES)  # type: ignore[no-untyped-call]  # JAX gives no types
    return NamedSharding(mesh, spec)


def batch_process(mesh: Mesh) -> tuple[int, int]:
    """Return (index, count) of the shard of each global batch that this process loads.

    These are ``jax.process_index()`` and ``jax.process_count()``, unless an axis that replicates
    rows (tensor, for example) spans processes: then processes with the same rows share an index.

    Parameters
    ----------
    mesh
        The device mesh.

    Returns
    -------
    tuple of int
        Index and count.

    Raises
    ------
    ValueError
        If the rows of the processes overlap without being the same.
    """
    rows_of: dict[int, set[int]] = {}
    device: Any
    parts = math.prod(mesh.shape[axis] for axis in _BATCH_AXES)
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((parts,)).items():
        rows_of.setdefault(device.process_index, set()).update(range(*rows.indices(parts)))
    shares = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if sum(len(share) for share in shares) != parts:
        raise ValueError(
            f"the rows of the processes overlap on a mesh of {dict(mesh.shape)}: choose "
            f"data x fsdp x expert as a multiple or a divisor of the {len(rows_of)} processes"
        )
    return shares.index(tuple(sorted(rows_of[jax.process_index()]))), len(shares)


def shard_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Create the global arrays of a batch on the mesh, rows sharded over data, fsdp and expert.

    Parameters
    ----------
    mesh
        The device mesh.
    batch
        Arrays [local rows, ...] with the rows of this process (see `batch_process`), in order.

    Returns
    -------
    dict
        Arrays [global rows, ...] with the sharding `batch_sharding`.

    Raises
    ------
    ValueError
        If data x fsdp x expert does not divide the global rows of an array; names both numbers.
    """
    sharding = batch_sharding(mesh)
    parts = math.prod(mesh.shape[axis] for axis in _BATCH_AXES)
    _, share_count = batch_process(mesh)
    problems = []
    for name, local in batch.items():
        if local.ndim == 0:
            problems.append(f"{name}: has no rows; give an array [rows, ...]")
        elif (rows := len(local) * share_count) % parts:
            problems.append(
                f"{name}: {rows} rows do not divide by {' x '.join(_BATCH_AXES)} = "
                f"{' x '.join(str(mesh.shape[axis]) for axis in _BATCH_AXES)} = {parts}: "
                f"choose a batch size that is a multiple of {parts}, or a smaller mesh"
            )
    if problems:
        raise ValueError("\n".join(problems))
    make_array: Any = jax.make_array_from_process_local_data  # JAX gives no types
    # An intended transfer, which JAX does not recognize with several processes.
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: make_array(sharding, local, (len(local) * share_count, *local.shape[1:]))
            for name, local in batch.items()
        }
