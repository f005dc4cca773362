"""Top level of a training run: initialize, prepare data, build, train and report."""

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import jax

import tjx_ckpt
import tjx_data
import tjx_metrics
import tjx_nn
import tjx_parallel
from tjx_core import ConfigError, printable, problems_of
from tjx_nn.layers.scan_layers import uses_scan
from tjx_trainer.cli.progress_bar import DataProgressBar
from tjx_trainer.cli.values import format_value
from tjx_trainer.config.config_tree import phase_configs
from tjx_trainer.config.phases import parse_phases
from tjx_trainer.config.run_config import Config, ModelConfig, reads_text
from tjx_trainer.planning.dry_run import print_dry_run
from tjx_trainer.runtime.allocator import retain_freed_memory, run_cpu_programs_inline
from tjx_trainer.runtime.attention_report import report_attention
from tjx_trainer.runtime.memory_report import explain_out_of_memory
from tjx_trainer.runtime.peer_failure import report_peer_failure
from tjx_trainer.runtime.preemption import PreemptionSync
from tjx_trainer.runtime.provenance import shared_settings
from tjx_trainer.runtime.run_dir import RunDirectory, check_run, make_run_dir, open_run
from tjx_trainer.runtime.run_logging import log_info, plain_warnings
from tjx_trainer.runtime.signals import SignalHandler, StopSignal
from tjx_trainer.runtime.watchdog import Watchdog
from tjx_trainer.scaling.dial import describe_dial
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.tasks.task import data_identity
from tjx_trainer.tasks.text_data import format_mixture
from tjx_trainer.training.build import Job, add_phases, build_job
from tjx_trainer.training.preflight import (
    apply_legacy_values,
    check_data_unchanged,
    check_requirements,
    find_backend,
)
from tjx_trainer.training.run_manager import RunManager
from tjx_trainer.training.run_summary import format_summary
from tjx_trainer.training.train_state import TrainState


def train(config: Config, *, dry_run: bool = False, eval_only: bool = False) -> int:
    """Train a run, or resume it from its latest checkpoint.

    Parameters
    ----------
    config : Config
        From the command line.
    dry_run : bool
        Compile and report the run without training.
    eval_only : bool
        Evaluate the initial parameters without training.

    Returns
    -------
    int
        Exit code: 0 after the last step, 128 + the signal's number after a stop request.

    Raises
    ------
    ConfigError
        If the run directory holds another run, or the configuration does not fit data or devices.
    tjx_data.HubError
        If the corpus or the tokenizer cannot be downloaded and is not cached.
    tjx_ckpt.CheckpointError
        If every checkpoint is corrupt, another process writes to the directory, or (SaveError) a
        checkpoint could not be written.
    tjx_metrics.RecordError
        If the metrics could not be written.
    NotFiniteError
        If the run diverged twice; a note names the last good checkpoint.
    KernelError
        If the attention kernel failed to compile or to run.
    KeyboardInterrupt
        On the second SIGINT.
    """
    run_cpu_programs_inline()
    try:
        tjx_parallel.initialize(config.distributed)
        tjx_parallel.check_equal_across_processes("configuration", shared_settings(config))
    except ValueError as error:
        raise ConfigError(problems_of(error)) from error
    if find_backend() == "cpu":
        retain_freed_memory()
    with (
        plain_warnings(),
        report_peer_failure(config.run_dir),
        report_attention(),
        SignalHandler() as signal_handler,
    ):
        try:
            return start(config, signal_handler, dry_run=dry_run, eval_only=eval_only)
        except StopSignal as stopped:
            log_info(f"{stopped} outside of training; run the same command to resume")
            return 128 + stopped.signal


def start(config: Config, signal_handler: SignalHandler, *, dry_run: bool, eval_only: bool) -> int:
    """Prepare, train and report a run; raises as documented in `train`."""
    with signal_handler.interruptible():
        check_requirements(config)
        if eval_only:
            config = replace(config, run_dir=None)  # no run directory is read or written
        config = apply_legacy_values(config)
        check_run(config)  # before the data are prepared, which can take minutes
        job = prepare(config)
        check_data_unchanged(job)
        if dry_run:
            return print_dry_run(job)
        if eval_only:
            return print_evaluation(job)
        run = create_run_dir(job)

    def on_claimed() -> None:
        with signal_handler.interruptible():
            write_run_files(job, run)
        log_info(f"run directory  {run.path}")

    return run_job(job, run, signal_handler, on_claimed=on_claimed)


def print_evaluation(job: Job) -> int:
    """Evaluate the initial parameters of a run and print the metrics."""
    params = job.eval_params(job.initial_state())
    metrics = job.evaluate(params).metrics()
    if tjx_parallel.is_main():
        lines = [f"{name:<15}{value:.4f}" for name, value in metrics.items()]
        sys.stdout.write("\n".join([*lines, "Nothing was trained."]) + "\n")
    return 0


def run_job(
    job: Job,
    run: RunDirectory,
    signal_handler: SignalHandler,
    *,
    on_claimed: Callable[[], None] = lambda: None,
) -> int:
    """Claim the run directory, train the remaining steps and report the results.

    Parameters
    ----------
    job : Job
        The components of the run.
    run : RunDirectory
        The run directory.
    signal_handler : SignalHandler
        Signals that request a stop or a save.
    on_claimed : callable
        Called after the directory is locked and before anything is written to it.

    Returns
    -------
    int
        The exit code, as documented in `train`, as are the errors.
    """
    config = job.config
    with (
        explain_out_of_memory(job),
        open_checkpointer(config, run) as checkpointer,
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(claim_run_dir(config, run, checkpointer))
        on_claimed()
        watchdog = stack.enter_context(
            Watchdog(run.path, config.watchdog, process=jax.process_index())
        )
        if tjx_parallel.is_main():
            run.remove_temporary_files()
        preemption = PreemptionSync(signal_handler)
        manager = RunManager(job, run, checkpointer, preemption, watchdog)
        with signal_handler.interruptible():
            state = manager.resume()
        state = manager.train(state)
        if preemption.stop:
            step = int(jax.device_get(state.step))
            log_info(
                f"stopped by {signal.Signals(preemption.stop).name} after saving step {step}; "
                f"to resume, run the same command with --run_dir {run.path}"
            )
            return 128 + preemption.stop
        watchdog.beat("sample", config.train.max_steps)
        with signal_handler.interruptible():
            report_results(manager, state)
    return 0


@contextlib.contextmanager
def claim_run_dir(
    config: Config, run: RunDirectory, checkpointer: tjx_ckpt.Checkpointer
) -> Iterator[None]:
    """Lock the run directory and the checkpoint directory against other runs.

    Raises
    ------
    tjx_ckpt.DirectoryInUseError
        If another run holds a lock.
    tjx_ckpt.ClaimError, tjx_ckpt.StorageError
        If a directory cannot be locked.
    """
    with contextlib.ExitStack() as stack:
        if config.checkpoint.directory is not None:
            # Two runs can share a run directory with different checkpoint directories: lock both.
            stack.enter_context(tjx_ckpt.Checkpointer(run.checkpoints)).claim()
        checkpointer.claim()
        yield


@contextlib.contextmanager
def open_checkpointer(config: Config, run: RunDirectory) -> Iterator[tjx_ckpt.Checkpointer]:
    """Open the checkpoints of a run, and wait for the last save at the end.

    After a second Ctrl-C the save in progress is abandoned, as if the process was killed; the next
    start removes its files.
    """
    choices = config.checkpoint
    checkpointer = tjx_ckpt.Checkpointer(
        run.checkpoint_location(config),
        keep=choices.keep,
        keep_every=choices.keep_every,
        keep_best=choices.keep_best,
        best_metric=choices.best_metric,
        best_mode=choices.best_mode,
    )
    try:
        yield checkpointer
    except KeyboardInterrupt:
        raise
    except BaseException:
        # Report the first error; a save that fails besides is logged.
        with contextlib.suppress(tjx_ckpt.SaveError):
            checkpointer.close()
        raise
    checkpointer.close()


def create_run_dir(job: Job) -> RunDirectory:
    """Create the run directory on process 0.

    Raises
    ------
    ConfigError
        If it cannot be created, or several processes were not given one directory.
    """
    config = job.config
    if jax.process_count() == 1:
        return make_run_dir(config)
    if config.run_dir is None:
        raise ConfigError([
            "run_dir: got none; expected one directory for all processes; give --run_dir"
        ])  # fmt: skip
    # No process may check the directory after process 0 has written to it.
    tjx_parallel.barrier("checked")
    run = make_run_dir(config) if tjx_parallel.is_main() else RunDirectory(Path(config.run_dir))
    tjx_parallel.barrier("run directory")
    return run


def write_run_files(job: Job, run: RunDirectory) -> None:
    """Write config.yaml, data.json and the task's files to a claimed run directory, on process 0.

    Raises
    ------
    ConfigError
        If another run wrote to the directory before it was claimed.
    """
    if tjx_parallel.is_main():
        config = replace(job.config, run_dir=str(run.path))
        check_data_unchanged(job)
        open_run(config)
        job.task.record(run)
        run.write_data_pointer(job.task.folders, identity=data_identity(job.task))
    tjx_parallel.barrier("recorded")


def prepare(config: Config) -> Job:
    """Open the data, fit the model to them, and build the job."""
    if jax.process_count() > 1 and config.train.sample_tokens:
        log_info(
            "note           no text samples with several processes; use `generate` of apps/eval"
        )
        config = replace(config, train=replace(config.train, sample_tokens=0))
    try:
        with DataProgressBar() as bar:
            config, make_task = open_task(config, bar)
        job = build_job(config, make_task)
        phases = phase_configs(config).items()
        job = add_phases(job, {step: build_job(*open_task(each)) for step, each in phases})
        tjx_parallel.check_equal_across_processes("data", data_identity(job.task))
    except (tjx_data.HubError, tjx_data.DataError):
        raise
    except ValueError as error:
        raise ConfigError(problems_of(error)) from error
    log_info(f"data           {job.task.data_summary}")
    if (mixture := format_mixture(job.task.train_data, job.config)) is not None:
        log_info(f"mixture        {mixture}")
    log_info(
        f"model          {tjx_nn.count_params(config.model):,} parameters on "
        f"{job.mesh.size} {job.mesh.devices.flat[0].device_kind}"
    )
    if config.lora.rank is not None:
        trained = sum(math.prod(x.shape) for x in jax.tree.leaves(job.abstract.params))
        log_info(f"adapters       {trained:,} parameters are trained ({config.lora.targets})")
    if type(config.model) in get_args(ModelConfig):
        log_info(f"layers         {describe_layers(job)}")
    log_info(f"training       {describe_training(job)}")
    if config.train.phases is not None:
        for step, values in parse_phases(config.train.phases)[0].items():
            settings = ", ".join(f"{name} {format_value(x)}" for name, x in values.items())
            log_info(f"phase          from step {step:,}: {settings}")
    for line in describe_dial(config):
        log_info(line)
    if flags := os.environ.get("XLA_FLAGS"):
        log_info(f"XLA flags      {flags}")
    return job


def describe_layers(job: Job) -> str:
    """Describe whether the blocks are compiled as a loop or unrolled, and why."""
    model = job.config.model
    count = model.n_layer // (job.mesh.shape["stage"] * job.config.mesh.chunks_per_stage)
    how = "compiled as a loop" if uses_scan(model, count) else "unrolled"
    if model.scan_layers is not None:
        return f"{model.n_layer} blocks {how}, as set by model.scan_layers"
    if how == "unrolled":
        return (
            f"{model.n_layer} blocks {how}, the default on this platform; "
            "--model.scan_layers true compiles faster and runs slower"
        )
    return f"{model.n_layer} blocks {how}, the default for this platform and depth"


def describe_training(job: Job) -> str:
    """Describe steps, batch, precision, optimizer and schedule of a run in one line."""
    config = job.config
    microbatches = "" if job.accumulation == 1 else f" in {job.accumulation} microbatches"
    what = "sequences" if reads_text(config) else "examples"
    return (
        f"{config.train.max_steps:,} steps of {config.train.batch_size:,} {what}{microbatches} in "
        f"{config.train.precision}; {config.optimizer.name}, {config.schedule.name} with a peak of "
        f"{config.optimizer.learning_rate:g}"
    )


def draw_loss(run: RunDirectory) -> str:
    """Plot the loss curve and return its path, or the error: the run itself is already saved."""
    try:
        run.plots.mkdir(exist_ok=True)
        tjx_metrics.plot_loss(run.metrics, run.plots / "loss.png")
    except Exception as error:  # such as a full disk, a damaged record, a missing font
        return f"none: {type(error).__name__}: {error}"
    return str(run.plots / "loss.png")


def report_results(manager: RunManager, state: TrainState) -> None:
    """Plot the loss curve and print the results; all processes take part in the computation."""
    job, run = manager.job, manager.run
    lines = job.task.final_report(job.eval_params(state), manager.final_metrics)
    if not tjx_parallel.is_main():
        return
    lines += [
        *format_summary(job.config, manager.summary),
        f"loss curve       {draw_loss(run)}",
        f"checkpoints      {run.checkpoint_location(job.config)}",
        f"metrics          {run.metrics}",
    ]
    if job.config.model.family == "gpt":
        chat = " --chat" if job.config.task == "sft" or job.config.rl.chat else ""
        lines.append(
            f"generate text    ./pants run apps/eval -- generate {run.path}{chat} --prompt TEXT"
        )
    sys.stdout.write(printable("\n".join(["", *lines]) + "\n"))
