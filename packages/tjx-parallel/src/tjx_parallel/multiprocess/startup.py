"""Start of a run with several processes: JAX's own coordination, nothing of ours."""

import os
from dataclasses import replace

import jax
from jax.experimental import multihost_utils

from tjx_parallel.config import DistributedConfig
from tjx_parallel.multiprocess.rendezvous import wait_for_all

# What JAX says when it recognises no cluster: the one test of that which it offers.
_NO_CLUSTER = "coordinator_address should be defined."
# What it says, before it looks for a cluster, when a device was used already.
_TOO_LATE = "must be called before"
# JAX aborts processes that wait at the end of a run for less time than a slow one may take, which
# counts as alive for a heartbeat timeout.
_SHUTDOWN_FACTOR = 3
# These say who the others are where the config does not. JAX reads the first alone.
_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def initialize(config: DistributedConfig | None = None) -> None:
    """Let this process join the others; call it before anything else uses a device.

    Who the others are is said by the config; else by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID of the environment; else by SLURM, Open MPI, Kubernetes or a TPU pod, where
    `jax.distributed` finds them. Anywhere else this is a run of one process, and nothing happens.

    Told by config or environment, a process uses all devices that it sees, or those that
    JAX_LOCAL_DEVICE_IDS names, and process 0 listens on the coordinator's address only. Under SLURM
    and Open MPI JAX takes one GPU for each process, that of its rank on the node; where JAX finds
    the processes, process 0 listens on all addresses, unless ``bind_address`` (or
    JAX_COORDINATOR_BIND_ADDRESS) says otherwise.

    Parameters
    ----------
    config
        None is `DistributedConfig`'s defaults.

    Raises
    ------
    ValueError
        If the environment holds only some of the three, or what is no number; one line for each.
        If the coordinator's address cannot be listened on, or a process that config or environment
        tell of does not come within ``start_timeout``; naming it.
    """
    config = _with_environment(config or DistributedConfig())
    if config.coordinator is None:
        if not jax.distributed.is_initialized():
            _join_cluster(config)
        return
    bind_address = config.bind_address or config.coordinator
    assert config.num_processes is not None
    assert config.process_id is not None
    wait_for_all(
        config.coordinator,
        bind_address,
        count=config.num_processes,
        index=config.process_id,
        timeout_s=float(config.start_timeout),
    )
    jax.distributed.initialize(
        config.coordinator,
        config.num_processes,
        config.process_id,
        # What was given is all: a cluster would add to it, and may be there only in part.
        cluster_detection_method="deactivate",
        coordinator_bind_address=bind_address,
        initialization_timeout=config.start_timeout,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
        shutdown_timeout_seconds=_SHUTDOWN_FACTOR * config.heartbeat_timeout,
    )


def is_main() -> bool:
    """Return whether this is process 0, the one that logs and writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
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


def _with_environment(config: DistributedConfig) -> DistributedConfig:
    """Return the config, completed by the environment where it names no processes."""
    if config.coordinator is not None or not {_COUNT, _INDEX} & os.environ.keys():
        return config
    count, index = _number(_COUNT), _number(_INDEX)
    try:
        return replace(
            config, coordinator=os.environ.get(_ADDRESS), num_processes=count, process_id=index
        )
    except ValueError as error:
        names = f"{_ADDRESS}, {_COUNT} and {_INDEX} in the environment"
        lines = [f"{names}: {line}" for line in str(error).splitlines()]
        raise ValueError("\n".join(lines)) from None


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise ValueError(f"{name} = {text!r} in the environment: must be a whole number")
    return None if text is None else int(text)


def _join_cluster(config: DistributedConfig) -> None:
    try:
        jax.distributed.initialize(
            coordinator_bind_address=config.bind_address,
            initialization_timeout=config.start_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=_SHUTDOWN_FACTOR * config.heartbeat_timeout,
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
    names = (_ADDRESS, "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")
    return any(count != "1" for count in counts) or any(name in os.environ for name in names)
