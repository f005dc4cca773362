"""Processes that act as one: each casts its vote at every tick and all learn the same maximum.

A signal reaches one process; if that one alone left its loop, the others would wait for it in the
next step for ever. So whoever is asked to stop says so here, and all read the answer at one tick.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


class Consensus:
    """Maximum of every process's votes, read one tick late, so that no process waits.

    All processes call `cast` at the same places of their program and in the same order as other
    computations. What a process votes at one tick all of them read at the next. With one process
    there is nobody to wait for: its vote counts at once, and no device is used.

    Parameters
    ----------
    size
        Numbers in a vote.

    Raises
    ------
    ValueError
        If ``size`` is less than 1.

    Examples
    --------
    >>> agreement = Agreement(2)
    >>> agreement.cast([0, 0]), agreement.cast([15, 1])
    ((0, 0), (15, 1))
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size = {size}: a vote has at least 1 number")
        self._nothing = (0,) * size
        self._pending: jax.Array | None = None
        if jax.process_count() == 1:
            return
        # All devices, as a step uses: on CPUs a program on some of them runs beside one on all, and
        # where both add up over the same ones, what they send gets mixed up.
        everyone = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        devices = np.array(everyone).reshape(jax.process_count(), -1)
        mesh = Mesh(devices, ("process", "local"), axis_types=(AxisType.Auto,) * 2)
        by_process, whole = PartitionSpec("process"), PartitionSpec()  # type: ignore[no-untyped-call]  # JAX gives no types
        self._by_process = NamedSharding(mesh, by_process)
        self._largest = jax.jit(
            lambda votes: votes.max(axis=0), out_shardings=NamedSharding(mesh, whole)
        )

    def vote(self, vote: Sequence[int]) -> tuple[int, ...]:
        """Vote, and return the largest of each number among all processes at the tick before.

        Parameters
        ----------
        vote
            Numbers of int32, 0 or more; 0 is no wish.

        Returns
        -------
        tuple of int
            The same in every process. With one process it is ``vote`` itself; with several, zeros
            at the first tick.

        Raises
        ------
        ValueError
            If the vote has another length.
        """
        if len(vote) != len(self._nothing):
            raise ValueError(f"a vote of {len(vote)} numbers: must have {len(self._nothing)}")
        if jax.process_count() == 1:
            return tuple(vote)
        row = np.asarray([vote], np.int32)
        make_array: Any = jax.make_array_from_process_local_data  # JAX gives no types
        with jax.transfer_guard_host_to_device("allow"):  # it is asked for
            votes = make_array(self._by_process, row)
        before, self._pending = self._pending, self._largest(votes)
        if before is None:
            return self._nothing
        return tuple(int(number) for number in np.asarray(jax.device_get(before)))
