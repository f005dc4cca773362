"""Start and barriers of multi-process runs through `jax.distributed`."""

import os
from dataclasses import replace

import jax
from jax.experimental import multihost_utils

from tjx_core import ConfigError, Problem
from tjx_parallel.config import DistributedConfig
from tjx_parallel.multiprocess.rendezvous import wait_for_all

# JAX's error message if it detects no cluster; JAX has no other test for it.
_NO_CLUSTER = "coordinator_address should be defined."
# JAX's error message if a device was used before initialization.
_TOO_LATE = "must be called before"
# At shutdown JAX aborts processes after this many heartbeat timeouts: a slow process counts as
# alive for one of them, so the default of one is too short.
_SHUTDOWN_FACTOR = 3
# Environment variables that replace missing config fields. JAX reads only the first itself.
_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def initialize(config: DistributedConfig | None = None) -> None:
    """Initialize `jax.distributed`; call it before any device is used.

    The processes are defined by the config; else by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID in the environment; else by cluster detection of `jax.distributed` (SLURM, Open
    MPI, Kubernetes, TPU pods). Otherwise the run has one process and the call has no effect.

    With config or environment, a process uses all visible devices, or those in
    JAX_LOCAL_DEVICE_IDS, and process 0 listens on the coordinator's address only. With cluster
    detection process 0 listens on all addresses, unless ``bind_address`` (or
    JAX_COORDINATOR_BIND_ADDRESS) is set, and under SLURM and Open MPI each process uses the GPU of
    its local rank.

    Parameters
    ----------
    config
        None uses the defaults of `DistributedConfig`.

    Raises
    ------
    ValueError
        If the environment has only some of the three variables, or a value that is no number; one
        line each. If process 0 cannot listen on the coordinator's address, or a process does not
        connect within ``start_timeout``.
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
        # The config is complete: cluster detection could add conflicting values.
        cluster_detection_method="deactivate",
        coordinator_bind_address=bind_address,
        initialization_timeout=config.start_timeout,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
        shutdown_timeout_seconds=_SHUTDOWN_FACTOR * config.heartbeat_timeout,
    )


def is_main() -> bool:
    """Return whether this is process 0, which logs and writes files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Block until every process has called it with the same name; no effect with one process.

    Parameters
    ----------
    name
        Name of the barrier, the same in all processes.

    Raises
    ------
    AssertionError
        If the processes give different names.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _with_environment(config: DistributedConfig) -> DistributedConfig:
    """Return the config, with the processes from the environment if it defines none."""
    if config.coordinator is not None or not {_COUNT, _INDEX} & os.environ.keys():
        return config
    count, index = _number(_COUNT), _number(_INDEX)
    try:
        return replace(
            config, coordinator=os.environ.get(_ADDRESS), num_processes=count, process_id=index
        )
    except ConfigError as error:
        variables = {"coordinator": _ADDRESS, "num_processes": _COUNT, "process_id": _INDEX}
        raise ConfigError(
            Problem(f"{variables[problem.path]} in the environment", problem.message)
            for problem in error.problems
        ) from None


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        message = f"got {text!r}; expected a whole number; correct the variable"
        raise ConfigError([Problem(f"{name} in the environment", message)])
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
        # Late initialization is an error only if there are other processes.
        if _TOO_LATE not in str(error) or _is_multiprocess_environment():
            raise


def _is_multiprocess_environment() -> bool:
    counts = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    names = (_ADDRESS, "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")
    return any(count != "1" for count in counts) or any(name in os.environ for name in names)
