"""Measure the cost of `train.reproducible mesh` on 8 CPU devices, relative to the normal mode.

Both modes train the model of the quickstart with 32 rows of 128 tokens, each in a process of its
own, as XLA reads its flags at startup. The processes take turns of two steps. CPU time is that of
all threads; on a machine with other load it has less noise than wall time.

    python tools/bench/reproducible.py --turns 20 --out results.json
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from turns import Json, Worker, machine, serve, summary

DEVICES, STEPS, VOCABULARY = 8, 2, 2048
MODES = ("none", "mesh")
FLAGS = ("--config=quickstart", "--train.batch_size=32")


def work(mode: str, mesh: list[str]) -> None:
    """Serve turns of training in one mode."""
    from tjx_trainer.runtime.xla_flags import request_reproducibility

    if mode == "mesh":
        request_reproducibility()
    import jax
    import numpy as np

    import tjx_parallel
    from tjx_trainer.cli.command_line import parse
    from tjx_trainer.training.build import build_step_components
    from tjx_trainer.training.train_state import initial_state

    flags = [*FLAGS, f"--train.reproducible={mode}", *(f"--mesh.{word}" for word in mesh)]
    config = parse(flags).with_vocabulary(VOCABULARY)
    parts = build_step_components(config, jax.devices())
    state: Any = initial_state(config, parts.optimizer, parts.abstract)
    shape = (config.train.batch_size, config.data.seq_len)
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, VOCABULARY, shape, np.int32) for name in ("tokens", "labels")}
    batch = tjx_parallel.shard_batch(parts.mesh, rows)

    def turn() -> Json:
        nonlocal state
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(STEPS):
            state, _ = parts.train_step(state, batch)
        jax.block_until_ready(state)  # type: ignore[no-untyped-call]
        spans = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        return {name: seconds / STEPS for name, seconds in spans.items()}

    serve({"turn": turn})


def measure(turns: int, mesh: list[str]) -> Json:
    """Let both modes take turns; return their times per step and the median ratios."""
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
    workers = {
        mode: Worker([sys.executable, __file__, "--mode", mode, *mesh], environment)
        for mode in MODES
    }
    times: dict[str, list[Json]] = {mode: [] for mode in MODES}
    for number in range(turns + 1):
        for mode in MODES if number % 2 else reversed(MODES):
            answer = workers[mode].ask("turn")
            if number:  # the first compiles
                times[mode].append(answer)
    for worker in workers.values():
        worker.stop()
    found: Json = {"mesh": mesh}
    for clock in ("wall", "cpu"):
        spans = {mode: [each[clock] for each in times[mode]] for mode in MODES}
        pairs = zip(spans["mesh"], spans["none"], strict=True)
        found[clock] = {
            **{mode: summary(spans[mode]) for mode in MODES},
            "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        }
    return found


def main() -> None:
    """Measure from the command line, print and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("mesh", nargs="*", default=["data=8"], help="axes, such as data=1 fsdp=8")
    options = parser.parse_args()
    if options.mode:
        work(options.mode, options.mesh)
        return
    results = {**measure(options.turns, options.mesh), "machine": machine()}
    text = json.dumps(results, indent=2) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
