"""Run the trainer in parallel worker processes and return the metric curves.

A run calls the `main` function of the trainer with a temporary run directory. The process pool has
one process per core: models this small gain little from a second core, so two runs in parallel
reach a higher total throughput than two in sequence.
"""

import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax

import tjx_data
import tjx_metrics
from tjx_trainer.cli.command_line import parse
from tjx_trainer.main import main

Json = dict[str, Any]
Flags = Mapping[str, str | int | float]

# Metrics to keep of metrics.jsonl; throughput is left out, as it depends on the machine.
METRICS = ("train/loss", "train/grad_norm", "train/skipped", "train/loss_scale", "eval/loss")
# Default model and data: 500 steps of 16 sequences take about 15 seconds on one core.
SMALL_GPT: Flags = {
    "data.corpus": "python-docs",
    "data.tokenizer": "bpe",
    "data.vocab_size": 512,
    "data.seq_len": 64,
    "model.max_seq_len": 64,
    "model.n_layer": 4,
    "model.n_head": 4,
    "model.d_model": 64,
}
USER_ERROR = 2  # exit code of the trainer for invalid flags


class RunFailedError(RuntimeError):
    """A run failed unexpectedly; the message contains its output."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the trainer.

    Attributes
    ----------
    arm : str
        Name of the configuration; runs of an arm differ only in the seed.
    flags : mapping from str to str, int or float
        Trainer flags without leading dashes, except run_dir and seed.
    seed : int
        Seed of the parameters and of the data order.
    after : callable or None
        Maps the run directory to additional measurements, in the worker process. Must be a
        module-level function, as it is pickled by name.
    """

    arm: str
    flags: Flags
    seed: int
    after: Callable[[Path], Json] | None = None

    def words(self, run_dir: Path) -> list[str]:
        """Return the command line of the trainer.

        Examples
        --------
        >>> Run(arm="a", flags={"train.max_steps": 3}, seed=1).words(Path("run"))
        ['--train.max_steps', '3', '--seed', '1', '--run_dir', 'run']
        """
        named = {**self.flags, "seed": self.seed, "run_dir": run_dir}
        return [word for name, value in named.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a run.

    Attributes
    ----------
    arm, seed, flags
        As in `Run`.
    exit_code : int
        Exit code of the trainer; 0 if it completed all steps.
    curves : dict from str to list of (step, value)
        Curve of each metric of `METRICS`.
    extra : dict
        Return value of `Run.after`.
    seconds : float
        Wall time, compilation included.
    """

    arm: str
    seed: int
    flags: Flags
    exit_code: int
    curves: dict[str, list[tuple[int, float]]]
    extra: Json = field(default_factory=dict)
    seconds: float

    @property
    def final_loss(self) -> float:
        """Validation loss after the last step in nats per token; NaN if there is none."""
        finished = self.exit_code == 0 and self.curves.get("eval/loss")
        return self.curves["eval/loss"][-1][1] if finished else float("nan")

    def as_json(self) -> Json:
        """Return the record for the results JSON."""
        return {**asdict(self), "seconds": round(self.seconds, 1)}


def run_all(
    runs: Sequence[Run], *, workers: int | None = None, journal: Path | None = None
) -> list[Outcome]:
    """Run all runs in parallel, one per core, and report progress on standard error.

    Parameters
    ----------
    runs : sequence of Run
        Runs to make; start the longest first to balance the load.
    workers : int or None
        Number of parallel runs; None means the number of cores.
    journal : Path or None
        File of finished runs: those in it are not run again, and new ones are appended.

    Returns
    -------
    list of Outcome
        In the order of `runs`.

    Raises
    ------
    RunFailedError
        If a run raises an exception or its flags are invalid.
    """
    outcomes = read_journal(journal, runs)
    if len(outcomes) == len(runs):
        return [outcomes[index] for index in range(len(runs))]
    prepare_data(runs)
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    workers = min(workers or os.cpu_count() or 1, len(runs) - len(outcomes))
    for core in range(workers):
        cores.put(core)
    with (
        tempfile.TemporaryDirectory(prefix="tjx-compiled-") as compiled,
        ProcessPoolExecutor(
            workers, mp_context=context, initializer=start_worker, initargs=(cores, compiled)
        ) as pool,
    ):
        futures = {
            pool.submit(run_one, run): index
            for index, run in enumerate(runs)
            if index not in outcomes
        }
        try:
            for future in as_completed(futures):
                found = outcomes[futures[future]] = future.result()
                if journal is not None:
                    with journal.open("a") as file:
                        file.write(json.dumps(found.as_json()) + "\n")
                say(
                    f"[{len(outcomes)}/{len(runs)}, {time.perf_counter() - started:.0f} s] "
                    f"{found.arm}, seed {found.seed}: {describe(found)}, {found.seconds:.0f} s"
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [outcomes[index] for index in range(len(runs))]


def read_journal(journal: Path | None, runs: Sequence[Run]) -> dict[int, Outcome]:
    """Return the outcomes of the runs, by index, that a journal has.

    Compared are arm, seed and flags.
    """
    found = {
        (outcome.arm, outcome.seed, *sorted(outcome.flags.items())): outcome
        for outcome in _finished(journal)
    }
    keys = [(run.arm, run.seed, *sorted(run.flags.items())) for run in runs]
    return {index: found[key] for index, key in enumerate(keys) if key in found}


def seconds_before(journal: Path) -> float:
    """Return the seconds that the finished runs of a journal took, with one run per core."""
    return sum(outcome.seconds for outcome in _finished(journal)) / (os.cpu_count() or 1)


def _finished(journal: Path | None) -> Iterator[Outcome]:
    """Read a journal; a torn last line is ignored."""
    if journal is None or not journal.is_file():
        return
    for line in journal.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield Outcome(**json.loads(line))


def run_one(run: Run) -> Outcome:
    """Run the trainer in this process.

    Raises
    ------
    RunFailedError
        If the run raises an exception or its flags are invalid.
    """
    started = time.perf_counter()
    printed = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="tjx-experiment-") as folder:
        run_dir = Path(folder) / "run"
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                exit_code = main(run.words(run_dir))
            except SystemExit as stop:
                exit_code = stop.code if isinstance(stop.code, int) else USER_ERROR
        if exit_code == USER_ERROR:
            raise RunFailedError(f"{run.arm}, {dict(run.flags)}:\n{printed.getvalue()}")
        return Outcome(
            arm=run.arm,
            seed=run.seed,
            flags=dict(run.flags),
            exit_code=exit_code,
            curves=curves(tjx_metrics.read_metrics(run_dir / "metrics.jsonl")),
            extra={} if run.after is None else run.after(run_dir),
            seconds=time.perf_counter() - started,
        )


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Convert records of metrics.jsonl to a list of (step, value) for each metric of `METRICS`.

    Only the changes of the count of skipped steps are kept.

    Examples
    --------
    >>> curves([{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.0, "eval/loss": 4.0}])
    {'train/loss': [(1, 3.0), (2, 2.0)], 'eval/loss': [(2, 4.0)]}
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name in METRICS:
            if name in record:
                found.setdefault(name, []).append((record["step"], record[name]))
    counts = found.get("train/skipped", [])
    changes = [
        point
        for before, point in zip([(0, -1.0), *counts], counts, strict=False)
        if point[1] != before[1]
    ]
    return {**found, "train/skipped": changes} if counts else found


def prepare_data(runs: Sequence[Run]) -> None:
    """Prepare the corpus once before the workers start, and validate the flags.

    Raises
    ------
    SystemExit
        With exit code 2, if flags are invalid.
    """
    configs = {parse(run.words(Path("unused"))).data for run in runs}
    for config in configs:
        tjx_data.open_sets(config)


def start_worker(cores: Any, compiled: str) -> None:
    """Pin this worker to one core and set the shared compilation cache.

    On one core XLA starts no intra-op threads that would contend. Runs that differ only in the seed
    share the compiled step; compiling takes longer than a short run.
    """
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):  # Linux only; without pinning runs are slower
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[core % len(allowed)]})
    for name, value in {
        "jax_platforms": "cpu",
        "jax_compilation_cache_dir": compiled,
        "jax_persistent_cache_min_compile_time_secs": 0,
    }.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]  # as jax is


def describe(outcome: Outcome) -> str:
    """Return a short description of the end of a run."""
    if outcome.exit_code:
        return f"ended with exit code {outcome.exit_code}"
    return f"validation loss {outcome.final_loss:.4f}"


def say(text: str) -> None:
    """Print a progress message to standard error."""
    print(text, file=sys.stderr, flush=True)
