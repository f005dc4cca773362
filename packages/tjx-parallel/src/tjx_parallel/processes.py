"""Start of a run with several processes: JAX's own coordination, nothing of ours."""

import os

import jax

# What JAX says when it recognises no cluster: the one test of that which it offers.
_NO_CLUSTER = "coordinator_address should be defined."
# What it says, before it looks for a cluster, when a device was used already.
_TOO_LATE = "must be called before"


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    bind_address: str | None = None,
    heartbeat_timeout: int = 100,
) -> None:
    """Let this process join the others; call it before anything else uses a device.

    With no arguments: under SLURM, Open MPI, Kubernetes or on a TPU pod `jax.distributed` finds the
    other processes by itself; anywhere else this is a run of one process, and nothing happens.
    Under SLURM and Open MPI JAX gives each process one GPU, that of its rank on the node: start one
    process a GPU, or set JAX_LOCAL_DEVICE_IDS.

    Parameters
    ----------
    coordinator
        "host:port" of process 0, the same everywhere.
    num_processes
        How many processes there are.
    process_id
        The number of this one, from 0.
    bind_address
        "host:port" on which process 0 listens. None takes ``coordinator``: only that address is
        open. Where JAX finds the processes itself, None leaves the choice to JAX: all interfaces.
    heartbeat_timeout
        Seconds of silence after which a process counts as dead and the others end.

    Raises
    ------
    ValueError
        If only some of the three are given, or they do not fit together; one line for each.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if all(value is None for value in given.values()):
        if not jax.distributed.is_initialized():
            _join_cluster(bind_address, heartbeat_timeout)
        return
    problems = [f"{name} is missing: give all three" for name in given if given[name] is None]
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        problems.append(f"coordinator = {coordinator!r}: must be host:port, e.g. 10.0.0.1:1234")
    if num_processes is not None and num_processes < 1:
        problems.append(f"num_processes = {num_processes}: must be 1 or more")
    if None not in (num_processes, process_id) and not 0 <= process_id < num_processes:  # type: ignore[operator]  # both are numbers here
        problems.append(f"process_id = {process_id}: must be from 0 to {num_processes} - 1")
    if problems:
        raise ValueError("\n".join(problems))
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        coordinator_bind_address=bind_address or coordinator,
        heartbeat_timeout_seconds=heartbeat_timeout,
    )


def is_main() -> bool:
    """Return whether this is process 0, the one that logs and writes."""
    return jax.process_index() == 0


def _join_cluster(bind_address: str | None, heartbeat_timeout: int) -> None:
    try:
        jax.distributed.initialize(
            coordinator_bind_address=bind_address, heartbeat_timeout_seconds=heartbeat_timeout
        )
    except ValueError as error:
        if str(error) != _NO_CLUSTER:
            raise
    except RuntimeError as error:
        # Too late matters only where there are others to join.
        if _TOO_LATE not in str(error) or _seems_one_of_many():
            raise


def _seems_one_of_many() -> bool:
    counts = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    names = ("JAX_COORDINATOR_ADDRESS", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")
    return any(count != "1" for count in counts) or any(name in os.environ for name in names)
