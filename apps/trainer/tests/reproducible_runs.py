"""Program that trains a tiny model on several meshes and prints a digest of each final state.

    python reproducible_runs.py '[[["data=1"], ["fsdp=8", "zero=2"]], ["--flag=value"]]' ...

XLA_FLAGS are read when JAX starts, so `test_trainer_reproducible` runs this in a process of its
own. Each argument has meshes and flags. Prints for each a line with a JSON object: "runs" has the
digest of each mesh, "resumed" that of a run which changes from each mesh to the next in turn.
"""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from mesh_runs import TINY, VOCAB, batch_of

import tjx_parallel
from tjx_trainer.cli.command_line import parse
from tjx_trainer.config.mesh_checks import known_axis_sizes
from tjx_trainer.training.build import StepComponents, build_step_components
from tjx_trainer.training.train_state import initial_state, shardings_of

STEPS = 4
FLAGS = {
    **TINY,
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.dropout": 0.2,
    "train.accumulation": 2,
    "train.precision": "bf16",
}


def main(meshes: Sequence[Sequence[str]], flags: Sequence[str]) -> None:
    """Print the digests of the runs on `meshes`."""
    runs: dict[str, str] = {}
    between: Any = None
    metrics: Any = None
    for index, mesh in enumerate(meshes):
        step = _Trainer([*flags, *(f"--mesh.{word}" for word in mesh)])
        runs[" ".join(mesh)] = digest(step.train(step.initial(), 0, STEPS))
        # The run that changes its mesh: steps 0 to 3, in turn on each mesh.
        first, last = (STEPS * at // len(meshes) for at in (index, index + 1))
        state = step.initial() if between is None else step.place(between)
        between, metrics = jax.device_get(step.train(state, first, last, metrics))
    sys.stdout.write(json.dumps({"runs": runs, "resumed": digest((between, metrics))}) + "\n")


class _Trainer:
    """The step of one mesh."""

    def __init__(self, words: Sequence[str]) -> None:
        given = {**FLAGS, **dict(word.removeprefix("--").split("=") for word in words)}
        flags = [f"--{name}={value}" for name, value in given.items()]
        self._config = parse(flags).with_vocabulary(VOCAB)
        devices = math.prod(known_axis_sizes(self._config.mesh).values())
        self._parts: StepComponents = build_step_components(self._config, jax.devices()[:devices])

    def initial(self) -> Any:
        return initial_state(self._config, self._parts.optimizer, self._parts.abstract)

    def place(self, state: Any) -> Any:
        return jax.device_put(state, shardings_of(self._parts.abstract))

    def train(self, state: Any, first: int, last: int, metrics: Any = None) -> Any:
        for step in range(first, last):
            rows = batch_of(self._config, step, packed=True)
            batch = tjx_parallel.shard_batch(self._parts.mesh, rows)
            state, metrics = self._parts.train_step(state, batch)
        return state, metrics


def digest(state: Any) -> str:
    """Return a hash of all bits of a state and the metrics of its last step."""
    leaves = (np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(state)))
    return hashlib.sha256(b"".join(leaves)).hexdigest()


if __name__ == "__main__":
    for case in sys.argv[1:]:
        main(*json.loads(case))
