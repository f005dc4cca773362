"""Benchmark the host memory of loading a Hugging Face checkpoint onto eight CPU devices.

    python tools/bench/load_memory.py [--layers 32] [--output FILE]

requires jax, tjx-nn[hf] (or PYTHONPATH of their src) and Linux. A Llama with random weights is
saved in safetensors files of 220 MB and loaded in a process of its own for each way: parameter by
parameter with `hf.load(shardings=...)`, and as a whole with `jax.device_put` after it. Reported is
the largest anonymous memory beyond that before loading and beyond the arrays themselves, and its
ratio to the largest file; the goal of the first way is 1.3.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
from turns import machine

import tjx_nn
from tjx_nn import hf

DEVICES, GOAL = 8, 1.3
WAYS = ("by parameter", "whole")


def write_checkpoint(folder: Path, layers: int) -> int:
    """Save a model with random weights; return the bytes of its largest file."""
    config = tjx_nn.GPTConfig(
        vocab_size=32000, max_seq_len=2048, n_layer=layers, n_head=16, n_kv_head=8, d_model=1024,
        d_ff=2816, positions="rope", norm="rmsnorm", activation="swiglu", bias=False,
        tied_head=False,
    )  # fmt: skip
    params = jax.jit(tjx_nn.init, static_argnums=0)(config, jax.random.key(0))
    hf.save(folder, config, params, max_shard_bytes=220_000_000)
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process, without pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def shardings(config: Any) -> Any:
    """Shard the last dimension that the devices divide; vectors are replicated."""
    mesh = jax.make_mesh((DEVICES,), ("fsdp",))

    def shard(shape: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
        axes: list[str | None] = [None] * len(shape.shape)
        if len(axes) > 1 and shape.shape[-1] % DEVICES == 0:
            axes[-1] = "fsdp"
        spec = jax.sharding.PartitionSpec(*axes)  # type: ignore[no-untyped-call]  # as jax is
        return jax.sharding.NamedSharding(mesh, spec)

    shapes = jax.eval_shape(lambda: tjx_nn.init(config, jax.random.key(0)))
    return jax.tree.map(shard, shapes)


def load(folder: Path, way: str) -> dict[str, float]:
    """Load the checkpoint in this process and measure it."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if way == "by parameter":
        _, params = hf.load(folder, shardings=shardings)
    else:
        config, on_host = hf.load(folder)
        params = jax.device_put(on_host, shardings(config))
    for leaf in jax.tree.leaves(params):
        leaf.block_until_ready()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"seconds": round(seconds, 2), "arrays": arrays, "beyond": peak - before - arrays}


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--output", type=Path, help="output JSON file")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        print(json.dumps(load(Path(given.load[0]), given.load[1])))
        return
    with tempfile.TemporaryDirectory() as name:
        largest = write_checkpoint(Path(name) / "model", given.layers)
        sides = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--load", str(Path(name) / "model"), way]
            environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(DEVICES)}
            printed = subprocess.run(command, check=True, capture_output=True, env=environment)
            sides[way] = json.loads(printed.stdout)
            sides[way]["ratio"] = round(sides[way]["beyond"] / largest, 3)
            print(f"{way:<14}{sides[way]}", flush=True)
    verdict = "met" if sides[WAYS[0]]["ratio"] <= GOAL else "missed"
    print(f"{sides[WAYS[0]]['ratio']} of at most {GOAL}: {verdict}")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"date": date, "machine": machine(), "largest_file": largest, "sides": sides}
    default = Path(__file__).parent / "results" / f"load-memory-cpu-{date[:10]}.json"
    (given.output or default).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
