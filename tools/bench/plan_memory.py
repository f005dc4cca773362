"""Compare the memory predicted by `trainer plan` with the GPU's peak, for GPT-2 small and medium.

Requires an NVIDIA GPU. The plan runs in a process that sees no GPU. The same step then runs on the
GPU, and the allocator reports its peak.

    python tools/bench/plan_memory.py --chip h100 --out tools/bench/results
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import record

PRESETS = ("gpt2_small", "gpt2_medium")
FLAGS = ["--mesh.data=1", "--train.batch_size=12", "--train.device_batch_size=12"]
GOAL = 0.10


def planned(preset: str, chip: str) -> dict[str, Any]:
    """Return the output of `trainer plan` from a process that sees no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["plan", f"--config={preset}", *FLAGS, f"--chip={chip}", f"--out={folder}"]
        subprocess.run(
            [sys.executable, "-m", "tjx_trainer.main", *words],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        found: dict[str, Any] = json.loads((Path(folder) / "plan.json").read_text())
    return found


def measured(preset: str) -> int:
    """Return the peak device memory of two steps in bytes, measured in a subprocess."""
    words = [sys.executable, __file__, "--measure", preset]
    text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return int(text.splitlines()[-1])


def run_steps(preset: str) -> int:
    """Run two steps on random tokens; return the peak of the allocator in bytes."""
    import jax
    import numpy as np

    import tjx_parallel
    from tjx_trainer.cli.command_line import parse
    from tjx_trainer.config.run_config import GPT2_VOCAB_SIZE
    from tjx_trainer.training.build import build_step_components
    from tjx_trainer.training.train_state import initial_state

    config = parse([f"--config={preset}", *FLAGS]).with_vocabulary(GPT2_VOCAB_SIZE)
    [device] = jax.devices()[:1]
    parts = build_step_components(config, [device])
    state: Any = initial_state(config, parts.optimizer, parts.abstract)
    shape = (config.train.batch_size, config.data.seq_len)
    tokens = np.random.default_rng(0).integers(0, GPT2_VOCAB_SIZE, shape, np.int32)
    batch = tjx_parallel.shard_batch(parts.mesh, {"tokens": tokens, "labels": tokens})
    for _ in range(2):
        state, metrics = parts.train_step(state, batch)
    float(metrics["loss"])  # waits for the steps
    stats = device.memory_stats()
    if not stats:
        raise SystemExit(f"{device.device_kind} reports no memory statistics; run on an NVIDIA GPU")
    return int(stats["peak_bytes_in_use"])


def main() -> None:
    """Compare, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", default="h100")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(run_steps(options.measure))
        return
    rows = {}
    for preset in PRESETS:
        needed = measured(preset)
        told = planned(preset, options.chip)["memory"]["total"]
        rows[preset] = {"planned_bytes": told, "measured_bytes": needed, "ratio": told / needed}
        print(
            f"{preset}: planned {told / 2**30:.2f} GiB, measured {needed / 2**30:.2f} GiB, ratio "
            f"{told / needed:.3f} (goal within {GOAL:.0%})"
        )
    if options.out:
        record(
            options.out,
            f"plan-memory-{options.chip}",
            packages=("jax", "jaxlib"),
            chip=options.chip,
            flags=FLAGS,
            presets=rows,
        )


if __name__ == "__main__":
    main()
