"""Consensus: all processes read the same maximum at the same call, without blocking."""

import os
import socket
import subprocess
import sys

import pytest

from tjx_parallel import Consensus, barrier

VOTE = """
import sys
import jax
jax.config.update("jax_transfer_guard", "disallow")
jax.config.update("jax_num_cpu_devices", 2)
from tjx_parallel import Consensus, barrier, initialize
initialize()
index = jax.process_index()
assert jax.process_count() == 3
consensus = Consensus(2)
# At call t process 1 votes 15 once, process 2 votes 10 from call 4 on.
wish = lambda t: 15 if (index, t) == (1, 2) else 10 if index == 2 and t > 3 else 0
votes = [(wish(t), index) for t in range(8)]
print("heard", [consensus.vote(vote) for vote in votes], flush=True)
barrier("end")
"""


def test_all_processes_read_the_maximum_one_call_late() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    given = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "3", "JAX_PLATFORMS": "cpu"}
    given["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", VOTE],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **given, "JAX_PROCESS_ID": str(index)},
        )
        for index in range(3)
    ]
    try:
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], ends[0][1]
    stops = (0, 0, 0, 15, 0, 10, 10, 10)
    heard = [(stop, 2 if tick else 0) for tick, stop in enumerate(stops)]
    for out, _ in ends:
        assert f"heard {heard}\n" in out


def test_one_process_reads_its_vote_at_once() -> None:
    consensus = Consensus(2)
    assert [consensus.vote((0, 1)), consensus.vote((15, 0))] == [(0, 1), (15, 0)]
    with pytest.raises(ValueError, match="got 1 numbers; expected 2"):
        consensus.vote((1,))
    with pytest.raises(ValueError, match="size: got 0; expected 1 or more"):
        Consensus(0)
    barrier("single process")
