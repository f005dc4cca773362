"""What the processes of a run agree upon: the only module that knows that there are several."""

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

# A save of the slowest process may take long; a dead process ends the others by JAX's heartbeat.
_BARRIER_MS = 3_600_000


def is_main() -> bool:
    """Return whether this is process 0, which decides and commits."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes are here; safe in a thread, since no device takes part.

    Parameters
    ----------
    name
        Used once in the life of the processes.
    """
    if jax.process_count() > 1:
        # JAX offers this only with a collective on devices, which a thread must not start.
        client = distributed.global_state.client
        assert client is not None
        client.wait_at_barrier(f"tjx-ckpt:{name}", _BARRIER_MS)


def from_main(value: int) -> int:
    """Return process 0's value; called by all, in the main thread."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def all_agree(fine: bool) -> bool:
    """Return whether all processes say so; called by all, in the main thread."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.bool_(fine))))
