"""Measure the overhead of logging relative to the step time of the quickstart preset.

The step runs in one process with each choice of trackers and each cadence, alternately; the
median of each is reported. A step includes the transfer of its metrics to the host and one record.
Two figures are robust to background load: the time of the tracker calls in the training thread,
and the CPU time of a step over all threads. `--waits` simulates a step on an accelerator: the host
only waits, so the CPU time of tracker threads does not slow down the step.

    python tools/bench/logging_cost.py --out tools/bench/results
    python tools/bench/logging_cost.py --out tools/bench/results --waits 0.05
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import record

import tjx_metrics

VOCABULARY = 2048  # of the quickstart's tokenizer
STEPS = 20  # per measurement
EVERY = (1, 10)
GOAL = 0.01  # at the default cadence
CHOICES = ("jsonl", "all", "blocked")


@contextmanager
def opened(choice: str, folder: Path) -> Iterator[tjx_metrics.Tracker]:
    """Open metrics.jsonl alone, with all trackers, or with a tracker that blocks."""
    others: list[tjx_metrics.BackgroundTracker] = []
    release = threading.Event()

    def block(first: bool) -> tjx_metrics.Tracker:
        release.wait()
        raise OSError(f"blocked from the {'first' if first else 'last'} call on")

    if choice == "all":
        others = tjx_metrics.open_trackers(("tensorboard", "wandb", "trackio"), folder)
    elif choice == "blocked":
        others = [tjx_metrics.BackgroundTracker(block, "blocked")]
    records = tjx_metrics.JsonlTracker(folder / "metrics.jsonl")
    try:
        yield tjx_metrics.CompositeTracker([records, *others])
    finally:
        records.finish()
        for other in others:
            other.finish(timeout=0.1 if choice == "blocked" else 60.0)
        release.set()


class Training:
    """Training step of the quickstart preset on random tokens."""

    def __init__(self, flags: list[str]) -> None:
        import jax
        import numpy as np

        import tjx_parallel
        from tjx_trainer.cli.command_line import parse
        from tjx_trainer.training.build import build_step_components
        from tjx_trainer.training.train_state import initial_state

        config = parse(["--config=quickstart", *flags]).with_vocabulary(VOCABULARY)
        parts = build_step_components(config, jax.devices())
        self._state: Any = initial_state(config, parts.optimizer, parts.abstract)
        rng = np.random.default_rng(0)
        shape = (config.train.batch_size, config.data.seq_len)
        rows = {name: rng.integers(0, VOCABULARY, shape, np.int32) for name in ("tokens", "labels")}
        self._batch = tjx_parallel.shard_batch(parts.mesh, rows)
        self._step: Any = parts.train_step
        self._get = jax.device_get
        self.step()

    def step(self) -> dict[str, float]:
        """Run a step and return its metrics."""
        self._state, metrics = self._step(self._state, self._batch)
        values = self._get(metrics)
        return {f"train/{name}": float(value) for name, value in values.items()}


class Waiting:
    """Simulated step of `seconds` seconds on another device."""

    def __init__(self, flags: list[str], seconds: float) -> None:
        self._values, self._seconds = Training(flags).step(), seconds

    def step(self) -> dict[str, float]:
        """Wait for the step time and return metrics of a step."""
        time.sleep(self._seconds)
        return self._values


def turn(training: Training | Waiting, tracker: tjx_metrics.Tracker, first: int, every: int) -> Any:
    """Run steps; return the seconds of each step and call, and the total CPU seconds."""
    seconds, calls = [], []
    worked = time.process_time()
    for step in range(first, first + STEPS):
        begin = time.perf_counter()
        values = training.step()
        if step % every == 0:
            called = time.perf_counter()
            tracker.log(values, step)
            calls.append(time.perf_counter() - called)
        seconds.append(time.perf_counter() - begin)
    return seconds, calls, time.process_time() - worked


def main() -> None:
    """Measure alternately, print and write the results; the goal is reported, not enforced."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--waits", type=float, help="seconds of a simulated step")
    parser.add_argument("flags", nargs="*", help="flags of the trainer, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "TRACKIO_DIR": place}
        found = measure(Path(place), options.rounds, options.flags, options.waits)
    for name, run in found.items():
        print(
            f"{name}: {run['step_seconds'] * 1e3:.1f} ms a step; calls take "
            f"{run['call_seconds'] * 1e6:.0f} us each, {run['call_share']:.3%} of a step's time "
            f"(goal {GOAL:.0%}); against metrics.jsonl alone the step took {run['slower']:+.2%}, "
            f"and {run['more_processor']:+.2%} processor time"
        )
    if options.out:
        record(
            options.out,
            "logging-cpu" if options.waits is None else "logging-waiting",
            packages=("jax", "tensorboardX", "wandb", "trackio"),
            flags=["--config=quickstart", *options.flags],
            other_load=os.getloadavg(),
            steps=STEPS * options.rounds,
            waits=options.waits,
            goal=GOAL,
            logging=found,
        )


def measure(
    place: Path, rounds: int, flags: list[str], waits: float | None
) -> dict[str, dict[str, float]]:
    """Return the figures by choice and cadence, such as ``all every 10``."""
    training = Training(flags) if waits is None else Waiting(flags, waits)
    seconds: dict[str, list[float]] = {}
    calls: dict[str, list[float]] = {}
    processor: dict[str, float] = {}
    warnings.simplefilter("ignore", tjx_metrics.TrackerWarning)
    for number in range(rounds):
        for choice in CHOICES:
            for every in EVERY:
                name = f"{choice} every {every}"
                with opened(choice, place / f"{choice}-{every}-{number}") as tracker:
                    if choice == "all":
                        time.sleep(10)  # exclude one-time imports from the measurement
                    of_steps, of_calls, worked = turn(training, tracker, 1, every)
                seconds.setdefault(name, []).extend(of_steps)
                calls.setdefault(name, []).extend(of_calls)
                processor[name] = processor.get(name, 0.0) + worked
    found = {}
    for name, of_steps in seconds.items():
        every = int(name.rpartition(" ")[2])
        step = statistics.median(of_steps)
        alone = statistics.median(seconds[f"jsonl every {every}"])
        call = statistics.median(calls[name])
        found[name] = {
            "step_seconds": step,
            "call_seconds": call,
            "call_share": call / every / step,
            "slower": step / alone - 1,
            "processor_seconds": processor[name] / len(of_steps),
            "more_processor": processor[name] / processor[f"jsonl every {every}"] - 1,
        }
    return found


if __name__ == "__main__":
    main()
