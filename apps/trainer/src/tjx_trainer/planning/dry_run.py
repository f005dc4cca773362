"""``--dry_run``: everything of a run but its steps, and what they would come to."""

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
from tjx_trainer.runtime.provenance import format_mesh
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.training.build import Job
from tjx_trainer.training.step_timer import model_flops, total_peak_flops


def print_dry_run(job: Job) -> int:
    """Compile the step of a run on the devices that are here, and say what the run would be.

    Nothing is written but the prepared data, which the run itself would make.

    Parameters
    ----------
    job : Job
        The parts of the run.

    Returns
    -------
    int
        0; `ExitCode.OUT_OF_MEMORY` where it is known that the step does not fit.
    """
    begin = time.perf_counter()
    memory = measure(job, strict=True)
    seconds = time.perf_counter() - begin
    fits = memory.capacity is None or memory.total <= memory.capacity
    compiled = memory.temporaries is not None
    lines = [
        *_plan_of(job),
        *table(memory),
        f"compiled       the training step in {seconds:.1f} s" if compiled else
        "not compiled   another process would have to compile with this one",
    ]  # fmt: skip
    lines += ["It fits." if fits else "It does not fit.", *([] if fits else advice(job, memory))]
    lines.append("Nothing was trained. Without --dry_run the same command starts the run.")
    if tjx_parallel.is_main():
        sys.stdout.write("\n".join(lines) + "\n")
    return ExitCode.FINISHED if fits else ExitCode.OUT_OF_MEMORY


def _plan_of(job: Job) -> Iterator[str]:
    config, train = job.config, job.config.train
    yield f"run directory  {_run_dir(config)}"
    kind, processes = job.mesh.devices.flat[0].device_kind, jax.process_count()
    yield f"devices        {job.mesh.size} {kind}, mesh {format_mesh(job)}, processes {processes}"
    labels = job.task.train_data.batch(0)["labels"].size
    what = "tokens" if reads_text(config) else "labels"
    yield (
        f"a step         {labels * processes:,} {what} in {job.accumulation} "
        f"piece{'s' if job.accumulation > 1 else ''}, {si(model_flops(config))} FLOPs of the model"
    )
    total = labels * processes * train.max_steps
    rows = getattr(job.task.train_data, "rows_per_epoch", None)
    epochs = f", {train.batch_size * train.max_steps / rows:.2f} epochs" if rows else ""
    yield f"the run        {train.max_steps:,} steps, {si(float(total))} {what}{epochs}"
    if (peak := total_peak_flops(config, job.mesh)) is not None:
        fastest = model_flops(config) * train.max_steps / peak
        # A measured rate of this chip, else that of an H100: the source says which.
        near = next((x for x in CHIPS.values() if x.name.upper() in kind.upper()), CHIPS["h100"])
        yield (
            f"time           {duration(fastest / near.efficiency)} at {near.efficiency:.0%} of the "
            f"peak, evaluations not counted ({near.efficiency_source})"
        )
    evaluations = math.ceil(train.max_steps / train.eval_every) + 1  # before the first step, too
    yield f"evaluations    {evaluations:,}, one each {train.eval_every:,} steps"
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(job.abstract))
    keep = config.checkpoint.keep
    yield (
        f"checkpoints    {format_bytes(size)} each, one each {config.checkpoint.every:,} steps, "
        f"{f'the last {keep} kept' if keep else 'all kept'}"
    )
    yield f"parameters     {tjx_nn.count_params(config.model):,}"


def _run_dir(config: Config) -> str:
    """Say where a run would be, and from which step it would go on."""
    if config.run_dir is None:
        return f"a new one, runs/{config.name}-DATE-TIME"
    run = RunDirectory(Path(config.run_dir))
    steps = tjx_ckpt.list_steps(run.checkpoint_location(config)) if run.config.exists() else []
    return f"{run.path}, {f'going on from step {max(steps)}' if steps else 'from the start'}"
