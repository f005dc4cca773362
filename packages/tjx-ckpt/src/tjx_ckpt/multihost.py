"""Barriers, broadcasts and votes between the processes of a run."""

import jax
import numpy as np

# Public JAX has no barrier without a device collective, which a thread must not start.
from jax._src import distributed
from jax.experimental import multihost_utils

# Long, for slow saves; after the death of a process JAX's heartbeat ends the others.
_BARRIER_MS = 3_600_000


def is_main() -> bool:
    """Return whether this is process 0, which makes decisions and commits checkpoints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes reach the barrier; safe in a thread, since it uses no device.

    Parameters
    ----------
    name : str
        Unique among all barriers of these processes.
    """
    if jax.process_count() > 1:
        client = distributed.global_state.client
        assert client is not None
        client.wait_at_barrier(f"tjx-ckpt:{name}", _BARRIER_MS)


def from_main(value: int) -> int:
    """Broadcast the value of process 0; all processes call it in the main thread."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def all_true(value: bool) -> bool:
    """Return whether the value is true in all processes; all call it in the main thread."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.bool_(value))))
