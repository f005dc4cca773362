"""Exchange of small values that the host of each process computes."""

import itertools
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tjx_parallel.multiprocess.consistency import wait_on_host

_calls = itertools.count()


def exchange(value: Any) -> list[Any]:
    """Return the values that all processes give, in the order of the processes.

    All processes call it equally often, and in the same order relative to other computations. It
    blocks until the last process has called it. Use it for results that processes could disagree
    on, such as those of programs with a time limit: compute each one in one process.

    Parameters
    ----------
    value
        The value of this process: numbers, strings, None, and lists and dicts of them, as JSON has
        them. Floats keep their bits.

    Returns
    -------
    list
        A value of each process, the same in all of them. Tuples are lists.

    Raises
    ------
    TypeError
        If the value has no JSON form.

    Examples
    --------
    >>> exchange([1.5, None])
    [[1.5, None]]
    """
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if jax.process_count() == 1:
        return [json.loads(data.tobytes())]
    # Device collectives time out while another process is busy on its host.
    wait_on_host(f"tjx-parallel/exchange/{next(_calls)}")
    with jax.transfer_guard("allow"):  # intended transfers
        lengths = multihost_utils.process_allgather(np.int32(len(data)))
        # A power of two: few sizes are compiled.
        room = 1 << (int(lengths.max()) - 1).bit_length()
        rows = multihost_utils.process_allgather(np.pad(data, (0, room - len(data))))
    parts = zip(rows, lengths.tolist(), strict=True)
    return [json.loads(row[:length].tobytes()) for row, length in parts]
