"""Start of a run with several processes: JAX's own coordination, nothing of ours."""

import os

import jax
from jax.experimental import multihost_utils

# What JAX says when it recognises no cluster: the one test of that which it offers.
_NO_CLUSTER = "coordinator_address should be defined."
# What it says, before it looks for a cluster, when a device was used already.
_TOO_LATE = "must be called before"
_HEARTBEAT_TIMEOUT = 100  # seconds, as JAX has it
# With one of these in the environment it is we who say who the others are: JAX reads neither.
_COUNTED = frozenset({"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"})


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    bind_address: str | None = None,
    heartbeat_timeout: int | None = None,
) -> None:
    """Let this process join the others; call it before anything else uses a device.

    With no arguments: the environment says who the others are, by JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID; under SLURM, Open MPI, Kubernetes or on a TPU pod
    `jax.distributed` finds them by itself; anywhere else this is a run of one process, and nothing
    happens. Under SLURM and Open MPI JAX gives each process one GPU, that of its rank on the node:
    start one process a GPU, or set JAX_LOCAL_DEVICE_IDS.

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
        Seconds of silence after which a process counts as dead and JAX ends the others. None takes
        TJX_HEARTBEAT_TIMEOUT of the environment, or 100. A process that ends waits as long, at
        most, for the others to end as well.

    Raises
    ------
    ValueError
        If only some of the three are given, here or in the environment, or they do not fit
        together, or a number of the environment is none; one line for each.
    """
    if heartbeat_timeout is None:
        heartbeat_timeout = _number("TJX_HEARTBEAT_TIMEOUT") or _HEARTBEAT_TIMEOUT
    if heartbeat_timeout < 1:
        raise ValueError(f"heartbeat_timeout = {heartbeat_timeout}: must be 1 second or more")
    if all(value is None for value in (coordinator, num_processes, process_id)):
        if jax.distributed.is_initialized():
            return
        if not _COUNTED & os.environ.keys():
            _join_cluster(bind_address, heartbeat_timeout)
            return
        coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
        num_processes, process_id = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
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
        shutdown_timeout_seconds=heartbeat_timeout,
    )


def is_main() -> bool:
    """Return whether this is process 0, the one that logs and writes."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Wait until every process is here; with one process return at once.

    Parameters
    ----------
    name
        Of the place, the same in all processes.

    Raises
    ------
    AssertionError
        If processes meet at different places.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _join_cluster(bind_address: str | None, heartbeat_timeout: int) -> None:
    try:
        jax.distributed.initialize(
            coordinator_bind_address=bind_address,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
        )
    except ValueError as error:
        if str(error) != _NO_CLUSTER:
            raise
    except RuntimeError as error:
        # Too late matters only where there are others to join.
        if _TOO_LATE not in str(error) or _seems_one_of_many():
            raise


def _number(name: str) -> int | None:
    """Read a whole number of the environment; None where it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"{name} = {text!r} in the environment: must be a whole number")
    return int(text)


def _seems_one_of_many() -> bool:
    counts = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    names = ("JAX_COORDINATOR_ADDRESS", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")
    return any(count != "1" for count in counts) or any(name in os.environ for name in names)
