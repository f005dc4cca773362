"""``--dry_run``: compile the training step and report the run without training."""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

import tjx_ckpt
import tjx_nn
import tjx_parallel
from tjx_metrics.trackers.status_line import duration, si
from tjx_parallel.planning.chips import CHIPS
from tjx_trainer.config.run_config import Config, reads_text
from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.runtime.memory_report import advice, format_bytes, measure, table
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.training.build import Job, format_mesh
from tjx_trainer.training.step_timer import model_flops, total_peak_flops


def print_dry_run(job: Job) -> int:
    """Compile the training step on the local devices and print a summary of the run.

    Writes nothing but the prepared data, which the run itself needs.

    Parameters
    ----------
    job : Job
        The components of the run.

    Returns
    -------
    int
        0, or `ExitCode.OUT_OF_MEMORY` if the step does not fit.
    """
    begin = time.perf_counter()
    memory = measure(job, strict=True)
    seconds = time.perf_counter() - begin
    fits = memory.capacity is None or memory.total <= memory.capacity
    compiled = memory.temporaries is not None
    lines = [
        *_summary(job),
        *table(memory),
        f"compiled       the training step in {seconds:.1f} s" if compiled else
        "not compiled   with several processes all would have to compile",
    ]  # fmt: skip
    lines += ["It fits." if fits else "It does not fit.", *([] if fits else advice(job, memory))]
    lines.append("Nothing was trained. Run the command without --dry_run to start the run.")
    if tjx_parallel.is_main():
        sys.stdout.write("\n".join(lines) + "\n")
    return ExitCode.FINISHED if fits else ExitCode.OUT_OF_MEMORY


def _summary(job: Job) -> Iterator[str]:
    config, train = job.config, job.config.train
    yield f"run directory  {_run_dir(config)}"
    kind, processes = job.mesh.devices.flat[0].device_kind, jax.process_count()
    yield f"devices        {job.mesh.size} {kind}, mesh {format_mesh(job)}, processes {processes}"
    labels = job.task.train_data.batch(0)["labels"].size
    what = "tokens" if reads_text(config) else "labels"
    yield (
        f"step           {labels * processes:,} {what} in {job.accumulation} "
        f"microbatch{'es' if job.accumulation > 1 else ''}, {si(model_flops(config))} model FLOPs"
    )
    total = sum(n * each.rows(each.first_step)["labels"].size for n, each in job.segments())
    total *= processes
    rows = None if job.phases else getattr(job.task.train_data, "rows_per_epoch", None)
    epochs = f", {train.batch_size * train.max_steps / rows:.2f} epochs" if rows else ""
    yield f"run            {train.max_steps:,} steps, {si(float(total))} {what}{epochs}"
    if (peak := total_peak_flops(config, job.mesh)) is not None:
        fastest = sum(n * model_flops(each.config) for n, each in job.segments()) / peak
        # Measured MFU of this chip, else of an H100; the line names its source.
        near = next((x for x in CHIPS.values() if x.name.upper() in kind.upper()), CHIPS["h100"])
        yield (
            f"time           {duration(fastest / near.efficiency)} at {near.efficiency:.0%} of the "
            f"peak, without evaluations ({near.efficiency_source})"
        )
    evaluations = math.ceil(train.max_steps / train.eval_every) + 1  # with the one of step 0
    yield f"evaluations    {evaluations:,}, one every {train.eval_every:,} steps"
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(job.abstract))
    keep = config.checkpoint.keep
    yield (
        f"checkpoints    {format_bytes(size)} each, one every {config.checkpoint.every:,} steps, "
        f"{f'the last {keep} kept' if keep else 'all kept'}"
    )
    yield f"parameters     {tjx_nn.count_params(config.model):,}"


def _run_dir(config: Config) -> str:
    """Return the run directory, and the step from which the run would resume."""
    if config.run_dir is None:
        return f"new, runs/{config.name}-DATE-TIME"
    run = RunDirectory(Path(config.run_dir))
    steps = tjx_ckpt.list_steps(run.checkpoint_location(config)) if run.config.exists() else []
    return f"{run.path}, {f'resuming from step {max(steps)}' if steps else 'from the start'}"
