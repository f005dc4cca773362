"""Two processes save and restore one state; one process restores it, too."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tjx_ckpt import Checkpointer

# JAX declares these without types.
Abstract: Any = jax.ShapeDtypeStruct
P: Any = PartitionSpec

TOGETHER = """
import sys
import warnings
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tjx_ckpt import AllCheckpointsCorruptError, Checkpointer, CheckpointError

directory, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("fsdp"))

def state(step):
    local = np.arange(8, dtype=np.float32).reshape(4, 2)[2 * process : 2 * process + 2] + step
    return {"w": jax.make_array_from_process_local_data(sharding, local)}

abstract = {"w": jax.ShapeDtypeStruct((4, 2), np.float32, sharding=sharding)}

def restored_step(checkpointer):
    shard = checkpointer.restore(abstract)["w"].addressable_shards[0]
    return int(np.asarray(shard.data)[0, 0] - 4 * process)

with Checkpointer(directory, keep=2) as checkpointer:
    for step in (10, 20, 30):
        checkpointer.save(step, state(step))
    assert restored_step(checkpointer) == 30
    if process == 0:
        with open(f"{directory}/30/manifest.json", "ab") as file:
            file.write(b"x")
    warnings.simplefilter("ignore")
    assert restored_step(checkpointer) == 20
    assert checkpointer.steps() == [20]
    try:
        checkpointer.restore(abstract, step=30)
    except CheckpointError:
        print("agreed", flush=True)
"""


def test_two_processes_save_and_agree_and_one_process_reads(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path), str(port), str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            assert out.endswith("agreed\n")
    finally:
        for process in processes:
            process.kill()
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, P("x"))
    target = {"w": Abstract((4, 2), np.float32, sharding=sharding)}
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(target)["w"]
    np.testing.assert_array_equal(restored, np.arange(8).reshape(4, 2) + 20)
