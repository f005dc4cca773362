"""Multi-process start, and equivalence to one process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tjx_parallel import initialize
from tjx_parallel.config import DistributedConfig

TRAIN = """
import hashlib
import json
import sys
import jax
import numpy as np
from tjx_parallel import (
    MeshConfig, ShardingRules, batch_process, initialize, is_main, make_mesh, param_shardings,
    replicated, shard_batch,
)
from tjx_parallel.config import DistributedConfig

count, index, port = (int(argument) for argument in sys.argv[1:])
jax.config.update("jax_num_cpu_devices", 8 // count)
# A single process is initialized as one of one: it then reduces with Gloo, as several do, in the
# same order, which differs from that of sums within a process.
initialize(DistributedConfig(
    coordinator=f"127.0.0.1:{port}", num_processes=count, process_id=index, heartbeat_timeout=60,
))
assert jax.process_count() == count and is_main() == (index == 0)

mesh = make_mesh(MeshConfig(fsdp=4))
assert batch_process(mesh) == (index, count)
assert batch_process(make_mesh(MeshConfig(data=1, tensor=8))) == (0, 1)

rng = np.random.default_rng(0)
rows = rng.standard_normal((16, 32)).astype(np.float32)
local = 16 // count
batch = shard_batch(mesh, {"x": rows[index * local : (index + 1) * local]})
shapes = {"w": jax.ShapeDtypeStruct((32, 32), np.float32)}
shardings = param_shardings(mesh, ShardingRules(), {"w": ("embed", "mlp")}, shapes)
init = lambda key: {"w": 0.1 * jax.random.normal(key, (32, 32))}
params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))

def step(params, batch):
    loss_fn = lambda p: jax.numpy.mean((jax.nn.gelu(batch["x"] @ p["w"]) - batch["x"]) ** 2)
    loss, grads = jax.value_and_grad(loss_fn)(params)
    return jax.tree.map(lambda p, g: p - g, params, grads), loss

step = jax.jit(step, out_shardings=(shardings, replicated(mesh)))
gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))
digest = lambda x: hashlib.sha256(np.asarray(gather(x).addressable_data(0)).tobytes()).hexdigest()
losses, digests = [], [digest(batch["x"]), digest(params["w"])]
for _ in range(5):
    params, loss = step(params, batch)
    losses.append(float(loss))
    digests.append(digest(params["w"]))
print("result", json.dumps([losses, digests]), flush=True)
"""

JOIN = """
import jax
jax.config.update("jax_num_cpu_devices", 1)
from tjx_parallel import barrier, initialize
initialize()
barrier("here")
print("result", [jax.process_index(), jax.process_count(), jax.device_count()], flush=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment() -> dict[str, str]:
    """Return ours without what a cluster, in which the tests may run, says of itself."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "JAX_"))
    }
    return {**ours, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}


@contextmanager
def together(
    code: str, words: Sequence[Sequence[str]], variables: Callable[[int], Mapping[str, str]]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start a process for each row of words; none of them outlives the test."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *each],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(), **variables(index)},
        )
        for index, each in enumerate(words)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def result_of(process: subprocess.Popen[str]) -> Any:
    """Return what a process printed as its result."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    line = next(line for line in out.splitlines() if line.startswith("result"))
    return json.loads(line.removeprefix("result"))


def test_several_processes_equal_one_bitwise() -> None:
    alone, port = str(free_port()), str(free_port())
    words = [["1", "0", alone], *(["4", str(index), port] for index in range(4))]
    with together(TRAIN, words, lambda _: {}) as processes:
        one, *four = (result_of(process) for process in processes)
    assert four == [one] * 4
    losses, digests = one
    assert losses[-1] < losses[0]
    assert len(set(digests)) == len(digests)  # every step changed the parameters


def slurm(index: int, port: int) -> dict[str, str]:
    """Return what srun sets, for two tasks on one node; JAX makes the port of the job's id."""
    return {
        "SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }  # fmt: skip


def open_mpi(index: int, port: int) -> dict[str, str]:
    """Return what mpirun of Open MPI 4 sets, for two processes on one machine."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"{(port - 61440) << 12}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
    }  # fmt: skip


def told(index: int, port: int) -> dict[str, str]:
    """Return our own three, where Open MPI 5 says otherwise, whom JAX cannot ask without mpi4py."""
    return {
        "OMPI_COMM_WORLD_SIZE": "64", "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0", "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    }  # fmt: skip


def port_that_jax_may_choose() -> int:
    """Return a free port of those from which JAX takes one by the number of the job."""
    for port in range(61440, 65536):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("every port is taken")


@pytest.mark.parametrize(
    "of_cluster", [slurm, pytest.param(open_mpi, marks=pytest.mark.slow), told]
)
def test_two_processes_find_each_other(of_cluster: Callable[[int, int], dict[str, str]]) -> None:
    port = port_that_jax_may_choose()
    with together(JOIN, [[], []], lambda index: of_cluster(index, port)) as processes:
        assert [result_of(process) for process in processes] == [[0, 2, 2], [1, 2, 2]]


class Asked(Exception):  # noqa: N818  no error: it says that JAX was asked, and stops there
    """JAX was asked to join, with these arguments."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Have JAX raise what it is asked; no cluster and no variable of ours is around."""

    def ask(*arguments: Any, **options: Any) -> None:
        raise Asked(arguments, options)

    monkeypatch.setattr("tjx_parallel.multiprocess.startup.wait_for_all", lambda *_, **__: None)
    monkeypatch.setattr("jax.distributed.initialize", ask)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: False)
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROC")):
            monkeypatch.delenv(name)
    return monkeypatch


THREE = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.9:99",
    "JAX_NUM_PROCESSES": "3",
    "JAX_PROCESS_ID": "2",
}


def test_config_takes_precedence_over_the_environment(asked: pytest.MonkeyPatch) -> None:
    for name, value in THREE.items():
        asked.setenv(name, value)
    with pytest.raises(Asked) as by_environment:
        initialize(DistributedConfig(heartbeat_timeout=7))
    arguments, options = by_environment.value.args
    assert arguments == ("10.0.0.9:99", 3, 2)
    assert options["coordinator_bind_address"] == "10.0.0.9:99"
    assert options["heartbeat_timeout_seconds"] == 7
    assert options["shutdown_timeout_seconds"] == 21  # a slow process counts as alive for 7 s

    config = DistributedConfig(
        coordinator="10.0.0.1:11", num_processes=5, process_id=4, bind_address="10.1.0.1:11"
    )
    with pytest.raises(Asked) as by_config:
        initialize(config)
    arguments, options = by_config.value.args
    assert arguments == ("10.0.0.1:11", 5, 4)
    assert options["coordinator_bind_address"] == "10.1.0.1:11"


def test_cluster_detection_uses_heartbeat_and_bind_address(asked: pytest.MonkeyPatch) -> None:
    with pytest.raises(Asked) as by_cluster:
        initialize(DistributedConfig(heartbeat_timeout=7, bind_address="10.1.0.1:11"))
    arguments, options = by_cluster.value.args
    assert arguments == ()  # who is there, JAX finds
    assert options["heartbeat_timeout_seconds"] == 7
    assert options["shutdown_timeout_seconds"] == 21  # a slow process counts as alive for 7 s
    assert options["coordinator_bind_address"] == "10.1.0.1:11"


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        (
            {"JAX_NUM_PROCESSES": "4"},
            "ADDRESS in the environment: got none(.|\n)*PROCESS_ID in .*: got none",
        ),
        (
            {**THREE, "JAX_PROCESS_ID": "one"},
            "JAX_PROCESS_ID in the environment: got 'one'; expected",
        ),
        (
            {**THREE, "JAX_PROCESS_ID": "3"},
            "JAX_PROCESS_ID in the environment: got 3; expected 0 to",
        ),
        (
            {**THREE, "JAX_COORDINATOR_ADDRESS": "here"},
            "ADDRESS in the environment: got 'here'; expected host",
        ),
    ],
)
def test_invalid_environment_raises(
    asked: pytest.MonkeyPatch, variables: dict[str, str], complaint: str
) -> None:
    for name, value in variables.items():
        asked.setenv(name, value)
    with pytest.raises(ValueError, match=complaint):
        initialize()


def test_late_initialization_raises_only_with_other_processes(asked: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("jax.distributed.initialize() must be called before any JAX call")

    asked.setattr("jax.distributed.initialize", refuse)
    initialize()
    asked.setenv("SLURM_NTASKS", "2")
    with pytest.raises(RuntimeError, match="must be called before"):
        initialize()


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
def test_the_coordinator_listens_on_its_own_address_only() -> None:
    code = """
import sys
from tjx_parallel import initialize
from tjx_parallel.config import DistributedConfig
port = int(sys.argv[1])
initialize(DistributedConfig(coordinator=f"127.0.0.1:{port}", num_processes=1, process_id=0))
for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    for line in open(table).readlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if state == "0A" and address.endswith(f":{port:04X}"):
            print("listens", address, flush=True)
"""
    port = free_port()
    result = subprocess.run(
        [sys.executable, "-c", code, str(port)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment(),
    )
    found = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("listens")]
    loopback = ("0100007F", "0000000000000000FFFF00000100007F")  # also as IPv6 writes it
    assert found
    assert all(address.split(":")[0] in loopback for address in found), result.stdout


COMPARE = """
import json
import sys
import jax
jax.config.update("jax_num_cpu_devices", 1)
from tjx_parallel import check_equal_across_processes, exchange, initialize
from tjx_parallel.config import DistributedConfig

index, port = (int(argument) for argument in sys.argv[1:])
initialize(DistributedConfig(
    coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=index, heartbeat_timeout=60,
))
check_equal_across_processes("versions", {"jax": jax.__version__})
try:
    check_equal_across_processes("configuration", {"seed": 1, "learning_rate": [0.1, 0.2][index]})
except ValueError as error:
    message = str(error)
values = [exchange([[index, 0.1 * index, None, "é" * 9 * index]]), exchange(index)]
print("result", json.dumps([message, values]), flush=True)
"""


def test_processes_compare_and_exchange_values() -> None:
    port = str(free_port())
    with together(COMPARE, [[str(index), port] for index in range(2)], lambda _: {}) as processes:
        one, other = (result_of(process) for process in processes)
    assert one == other
    message, values = one
    assert message.startswith("learning_rate: got 0.1 in process 0 and 0.2 in process 1; expected")
    assert "seed" not in message
    assert values == [[[[0, 0.0, None, ""]], [[1, 0.1, None, 9 * "é"]]], [0, 1]]
