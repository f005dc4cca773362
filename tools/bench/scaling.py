"""Measure the overhead of data parallelism on 2 and 4 virtual CPU devices relative to one.

The devices share the cores and the global batch is constant, so the slowdown is the cost of
sharding the batch and reducing the gradients. Each device count runs in a separate process, as JAX
fixes it at startup; the processes alternate, and the best time of each counts.

    python tools/bench/scaling.py --out tools/bench/results
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import record

COUNTS = (1, 2, 4)
GOALS = {2: 0.90, 4: 0.85}
STEPS = 6
FLAGS = [
    "--config=shakespeare_char",
    "--optimizer.name=adamw",
    "--data.seq_len=256",
    "--model.max_seq_len=256",
    "--model.n_layer=6",
    "--model.n_head=6",
    "--model.d_model=384",
    "--train.batch_size=32",
    "--mesh.data=-1",
    "--train.sample_tokens=0",
]
VOCABULARY = 65


def measure(count: int) -> dict[str, float]:
    """Return seconds per step and gradient bytes sent per device, on `count` devices."""
    os.environ["JAX_NUM_CPU_DEVICES"] = str(count)
    import jax
    import numpy as np

    import tjx_parallel
    from tjx_nn import count_params
    from tjx_parallel.planning.collectives import collectives
    from tjx_trainer.cli.command_line import parse
    from tjx_trainer.training.build import build_step_components
    from tjx_trainer.training.train_state import initial_state

    config = parse(FLAGS).with_vocabulary(VOCABULARY)
    parts = build_step_components(config, jax.devices())
    state: Any = initial_state(config, parts.optimizer, parts.abstract)
    rng = np.random.default_rng(0)
    shape = (config.train.batch_size, config.data.seq_len)
    rows = {name: rng.integers(0, VOCABULARY, shape, np.int32) for name in ("tokens", "labels")}
    batch = tjx_parallel.shard_batch(parts.mesh, rows)
    lowered: Any = parts.train_step
    step = lowered.lower(state, batch).compile()
    best = math.inf
    for _ in range(STEPS):
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        float(metrics["loss"])  # waits for the step
        best = min(best, time.perf_counter() - begin)
    sent = sum(each.wire_bytes for each in collectives(step.as_text(), parts.mesh.shape))
    theory = 2 * (count - 1) / count * 4 * count_params(config.model)
    return {"seconds": best, "wire_bytes": sent, "wire_bytes_by_formula": theory}


def main() -> None:
    """Measure alternately, print and write the results; goals are reported, not enforced."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        print(json.dumps(measure(options.count)))
        return
    found: dict[int, dict[str, float]] = {}
    for _ in range(options.rounds):
        for count in COUNTS:
            words = [sys.executable, __file__, "--count", str(count)]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            text = subprocess.run(
                words, check=True, capture_output=True, text=True, env=environment
            ).stdout
            run = json.loads(text.splitlines()[-1])
            if count not in found or run["seconds"] < found[count]["seconds"]:
                found[count] = run
    for count, run in found.items():
        run["ratio"] = found[1]["seconds"] / run["seconds"]
        goal = f" (goal {GOALS[count]})" if count in GOALS else ""
        print(
            f"{count} devices: {run['seconds']:.3f} s a step, {run['ratio']:.2f} of one{goal}; "
            f"sent {run['wire_bytes']:,.0f} bytes, by formula {run['wire_bytes_by_formula']:,.0f}"
        )
    if options.out:
        packages = ("jax", "jaxlib", "flax", "optax")
        record(options.out, "scaling-cpu", packages=packages, flags=FLAGS, devices=found)


if __name__ == "__main__":
    main()
