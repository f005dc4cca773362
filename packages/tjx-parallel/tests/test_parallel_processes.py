"""Two processes with four devices each compute what one process with eight does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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

count, index, port = (int(argument) for argument in sys.argv[1:])
jax.config.update("jax_num_cpu_devices", 8 // count)
if count == 1:
    initialize()
else:
    initialize(f"127.0.0.1:{port}", count, index)
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
losses = []
gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))
digest = lambda x: hashlib.sha256(np.asarray(gather(x).addressable_data(0)).tobytes()).hexdigest()
exact = [digest(batch["x"]), digest(params["w"])]
for _ in range(5):
    params, loss = step(params, batch)
    losses.append(float(loss))
result = {"exact": exact, "losses": losses, "trained": digest(params["w"])}
print("result", json.dumps(result), flush=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def start(count: int) -> list[subprocess.Popen[str]]:
    """Start ``count`` processes that train together."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(count), str(index), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for index in range(count)
    ]


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a process printed as its result."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    line = next(line for line in out.splitlines() if line.startswith("result"))
    result: dict[str, Any] = json.loads(line.removeprefix("result"))
    return result


def test_two_processes_of_four_devices_compute_what_one_of_eight_does() -> None:
    processes = [*start(1), *start(2)]
    try:
        one, first, second = (result_of(process) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert first == second
    # Where numbers are put is exact. Sums are not: other processes add up in another order.
    assert first["exact"] == one["exact"]
    np.testing.assert_allclose(first["losses"], one["losses"], rtol=1e-6)
    assert one["losses"][-1] < one["losses"][0]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
def test_the_coordinator_listens_on_its_own_address_only() -> None:
    code = """
import socket, sys
import jax
from tjx_parallel import initialize
port = int(sys.argv[1])
initialize(f"127.0.0.1:{port}", 1, 0)
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
