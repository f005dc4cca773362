"""Outcome of a run, for bitwise comparison of two runs."""

import functools
import hashlib
import json
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tjx_ckpt
import tjx_parallel
from tjx_parallel.config import MeshConfig
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.training.build import make_update_rule
from tjx_trainer.training.train_state import abstract_state

# Times differ between runs; all other numbers must be equal.
_TIMED = re.compile(r"_per_sec|seconds|mfu|hours|^checkpoint/|^time/|^memory/|^compile/")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Deterministic results of a run.

    Attributes
    ----------
    leaves
        SHA-256 of each leaf of the last checkpoint, dtype and shape included, by its path.
    numbers
        Every logged number that does not depend on time, by step and name.
    files
        Names of the files in the run directory and next to the checkpoints.
    """

    leaves: dict[str, str]
    numbers: dict[tuple[int, str], str]
    files: frozenset[str]


class TwiceError(AssertionError):
    """metrics.jsonl has a repeated number, or steps that do not ascend."""


def outcome(run_dir: Path) -> Outcome:
    """Read the outcome of a run.

    Raises
    ------
    TwiceError
        If a number is logged twice for one step.
    tjx_ckpt.CheckpointError
        If its last checkpoint is damaged.
    """
    run = RunDirectory(run_dir)
    last = max(tjx_ckpt.list_steps(run.checkpoints))
    places = (run_dir, run.checkpoints)
    return Outcome(
        leaves=digests(run_dir, last),
        numbers=numbers(run_dir),
        files=frozenset(
            str(path.relative_to(run_dir)) for place in places for path in place.iterdir()
        ),
    )


def describe_difference(one: Outcome, other: Outcome) -> list[str]:
    """Return one line for each kind of difference; none if the runs are bitwise equal."""
    lines = []
    for what in ("leaves", "numbers"):
        a, b = getattr(one, what), getattr(other, what)
        differing = sorted(str(key) for key in a.keys() | b.keys() if a.get(key) != b.get(key))
        if differing:
            first = ", ".join(differing[:4])
            lines.append(f"{len(differing)} of {len(a)} {what} differ, such as {first}")
    if one.files != other.files:
        lines.append(f"files differ: {', '.join(sorted(one.files ^ other.files))}")
    return lines


def numbers(run_dir: Path) -> dict[tuple[int, str], str]:
    """Return every logged number that does not depend on time.

    Raises
    ------
    TwiceError
        If a number is logged twice for one step, or steps do not ascend.
    """
    found: dict[tuple[int, str], str] = {}
    before = -1
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = int(record.pop("step"))
        if step < before:
            raise TwiceError(f"{run_dir}: step {step} comes after step {before}")
        before = step
        for name, value in record.items():
            if _TIMED.search(name):
                continue
            if (step, name) in found:
                raise TwiceError(f"{run_dir}: {name} of step {step} is logged twice")
            # As text, NaN equals itself and no digit is lost.
            found[step, name] = repr(value)
    return found


def digests(run_dir: Path, step: int) -> dict[str, str]:
    """Restore one checkpoint of a run; return the SHA-256 of each leaf."""
    checkpointer = tjx_ckpt.Checkpointer(run_dir / "checkpoints")
    return digest_leaves(checkpointer.restore(abstract_of(run_dir), step=step))


def digest_leaves(state: Any) -> dict[str, str]:
    """Return the SHA-256 of each leaf, dtype and shape included, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path): _digest(np.asarray(leaf)) for path, leaf in leaves}


def abstract_of(run_dir: Path) -> Any:
    """Return shapes and dtypes of a run's state, on one device of this process."""
    return _abstract_of((run_dir / "config.yaml").read_text(), run_dir)


@functools.lru_cache(maxsize=8)
def _abstract_of(_config: str, run_dir: Path) -> Any:
    config = replace(RunDirectory(run_dir).read_config(), mesh=MeshConfig())
    _, optimizer = make_update_rule(config)
    mesh = tjx_parallel.make_mesh(MeshConfig(), jax.devices()[:1])
    return abstract_state(config, optimizer, mesh, tjx_parallel.ShardingRules())


def _digest(leaf: np.ndarray) -> str:
    head = f"{leaf.dtype} {leaf.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(leaf).tobytes()).hexdigest()


def conclude(results: Any, folder: Path, *, failed: bool, output: Path | None) -> int:
    """Print and write the results of a campaign; delete its folder, unless it failed.

    Returns
    -------
    int
        The exit code.
    """
    text = json.dumps(results, indent=2) + "\n"
    print(text, end="")
    if output is not None:
        output.write_text(text)
    if failed:
        print(f"runs are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0
