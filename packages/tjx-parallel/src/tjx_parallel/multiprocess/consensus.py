"""Consensus between processes: the element-wise maximum of all votes, read one call late.

A signal may reach one process only. If that process alone left the training loop, the others would
wait for it in the next step forever. With a vote every process stops at the same step.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


class Consensus:
    """Element-wise maximum over the votes of all processes, without blocking.

    All processes call `vote` at the same points of the program and in the same order relative to
    other computations. The votes of one call are returned by the next one. With one process a vote
    is returned at once, and no device is used.

    Parameters
    ----------
    size
        Length of a vote.

    Raises
    ------
    ValueError
        If ``size`` is less than 1.

    Examples
    --------
    >>> consensus = Consensus(2)
    >>> consensus.vote([0, 0]), consensus.vote([15, 1])
    ((0, 0), (15, 1))
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size: got {size}; expected 1 or more; give the length of a vote")
        self._zeros = (0,) * size
        self._pending: jax.Array | None = None
        if jax.process_count() == 1:
            return
        # All devices, as in a training step: on CPUs a program on some of them runs concurrently
        # with one on all, and their collectives interfere.
        ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        devices = np.array(ordered).reshape(jax.process_count(), -1)
        mesh = Mesh(devices, ("process", "local"), axis_types=(AxisType.Auto,) * 2)
        by_process, whole = PartitionSpec("process"), PartitionSpec()  # type: ignore[no-untyped-call]  # JAX gives no types
        self._by_process = NamedSharding(mesh, by_process)
        self._largest = jax.jit(
            lambda votes: votes.max(axis=0), out_shardings=NamedSharding(mesh, whole)
        )

    def vote(self, vote: Sequence[int]) -> tuple[int, ...]:
        """Submit a vote and return the element-wise maximum of the previous call's votes.

        Parameters
        ----------
        vote
            int32 numbers, 0 or more; 0 requests nothing.

        Returns
        -------
        tuple of int
            The same in every process: with one process ``vote`` itself, with several zeros at the
            first call.

        Raises
        ------
        ValueError
            If the vote does not have ``size`` numbers.
        """
        if len(vote) != len(self._zeros):
            raise ValueError(
                f"vote: got {len(vote)} numbers; expected {len(self._zeros)}; correct its length"
            )
        if jax.process_count() == 1:
            return tuple(vote)
        row = np.asarray([vote], np.int32)
        make_array: Any = jax.make_array_from_process_local_data  # JAX gives no types
        with jax.transfer_guard_host_to_device("allow"):  # an intended transfer
            votes = make_array(self._by_process, row)
        before, self._pending = self._pending, self._largest(votes)
        if before is None:
            return self._zeros
        return tuple(int(number) for number in np.asarray(jax.device_get(before)))
