"""One run: from a configuration to a finished run directory, or on from where it stopped."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax

import tjx_ckpt
import tjx_data
import tjx_metrics
import tjx_nn
import tjx_parallel
from tjx_ckpt.command.terminal import printable
from tjx_nn.stack import runs_as_loop
from tjx_trainer.allocator import keep_freed_memory
from tjx_trainer.attention_report import reporting_attention
from tjx_trainer.config import Config, ConfigError, reads_text
from tjx_trainer.dry_run import show_plan
from tjx_trainer.interrupt import Interrupts, Stopped
from tjx_trainer.job import Job, build_job
from tjx_trainer.lost_process import explaining_loss
from tjx_trainer.memory_report import explaining_memory
from tjx_trainer.messages import say, telling_warnings
from tjx_trainer.preparing import PreparationBar
from tjx_trainer.provenance import what_all_share
from tjx_trainer.recovery import Course
from tjx_trainer.requests import Requests
from tjx_trainer.results import describe_results
from tjx_trainer.resuming import with_earlier_values
from tjx_trainer.run_dir import RunDirectory, check_run, make_run_dir, open_run
from tjx_trainer.state import TrainState
from tjx_trainer.task import data_identity
from tjx_trainer.task_table import open_task
from tjx_trainer.watchdog import Watchdog

# On the host: a token and its label, and batches that are read, waiting and being moved.
BYTES_OF_A_TOKEN = 8
BATCHES_AT_ONCE = 3


def train(config: Config, *, dry_run: bool = False, eval_only: bool = False) -> int:
    """Train, or go on where the run directory stopped.

    Parameters
    ----------
    config : Config
        From the command line.
    dry_run : bool
        Only say what would be done, and compile it.
    eval_only : bool
        Only evaluate the parameters that the run begins with.

    Returns
    -------
    int
        Exit code: 0 when the last step was made, 128 + the signal's number when asked to stop.

    Raises
    ------
    ConfigError
        If the run directory holds another run, or the configuration does not fit data or devices.
    tjx_data.HubError
        If the corpus or the tokenizer is out of reach.
    tjx_ckpt.CheckpointError
        If there are checkpoints and none is sound, another process saves there, or (SaveError) a
        checkpoint could not be written.
    tjx_metrics.RecordError
        If the metrics could not be written.
    NotFiniteError
        If too many steps in a row were not finite, twice; a note names the last good checkpoint.
    KernelError
        If the attention kernel failed to compile or to run.
    KeyboardInterrupt
        At a second SIGINT.
    """
    try:
        tjx_parallel.initialize(config.distributed)
        tjx_parallel.require_equal("configuration", what_all_share(config))
    except ValueError as error:
        raise ConfigError(str(error).splitlines()) from error
    if find_backend() == "cpu":
        keep_freed_memory()
    with (
        telling_warnings(),
        explaining_loss(config.run_dir),
        reporting_attention(),
        Interrupts() as interrupts,
    ):
        try:
            return start(config, interrupts, dry_run=dry_run, eval_only=eval_only)
        except Stopped as stopped:
            say(f"{stopped}; nothing was lost, the same command goes on")
            return 128 + stopped.signal


def find_backend() -> str:
    """Return the platform that JAX computes on.

    Raises
    ------
    ConfigError
        If JAX_PLATFORMS names one that is not there.
    """
    try:
        return jax.default_backend()
    except RuntimeError as error:
        wanted = os.environ.get("JAX_PLATFORMS", "")
        if not wanted:
            raise
        raise ConfigError([
            f"JAX_PLATFORMS: got {wanted}; expected platforms whose devices are here "
            f"({' '.join(str(error).split())[:300]}); unset it, or set JAX_PLATFORMS=cpu"
        ]) from None  # fmt: skip


def start(config: Config, interrupts: Interrupts, *, dry_run: bool, eval_only: bool) -> int:
    """Prepare the run, make its steps and conclude it; what is raised is as `train` says."""
    with interrupts.leaving_at_once():
        refuse_what_is_missing(config)
        if eval_only:
            config = replace(config, run_dir=None)  # nothing is read or written there
        config = keep_earlier_values(config)
        check_run(config)  # before minutes are spent on the data
        job = prepare(config)
        refuse_other_data(job)
        if dry_run:
            return show_plan(job)
        if eval_only:
            return show_evaluation(job)
        run = take_run_dir(job)

    def record() -> None:
        with interrupts.leaving_at_once():
            record_run(job, run)
        say(f"run directory  {run.path}")

    return carry_out(job, run, interrupts, claimed=record)


def keep_earlier_values(config: Config) -> Config:
    """Return the configuration with what its run, started by an older version, means by it."""
    run = None if config.run_dir is None else RunDirectory(Path(config.run_dir))
    if run is None or not run.config.exists():
        return config
    try:
        saved = run.read_config()
    except ConfigError:
        return config  # `check_run` raises with the reasons
    config, lines = with_earlier_values(config, saved)
    for line in lines:
        say(f"note           {line}")
    return config


def refuse_what_is_missing(config: Config) -> None:
    """Raise ConfigError where this machine lacks data or libraries that a run needs."""
    problems = tjx_data.find_problems(config.data) if reads_text(config) else []
    problems += batch_problems(config, host_memory())
    if config.checkpoint.directory is not None:
        try:
            tjx_ckpt.list_steps(config.checkpoint.directory)
        except (ImportError, ValueError) as error:
            problems.append(f"--checkpoint.directory {config.checkpoint.directory}: {error}")
    try:
        tjx_metrics.refuse_trackers(config.log.trackers)
    except ValueError as error:
        problems += [f"--log.{error}"]
    if problems:
        raise ConfigError(problems)


def show_evaluation(job: Job) -> int:
    """Evaluate the parameters that a run begins with, and print the figures."""
    params = job.params_to_use(job.initial_state())
    metrics = job.evaluate(params).metrics()
    if tjx_parallel.is_main():
        lines = [f"{name:<15}{value:.4f}" for name, value in metrics.items()]
        sys.stdout.write("\n".join([*lines, "Nothing was trained."]) + "\n")
    return 0


def batch_problems(config: Config, memory: int) -> list[str]:
    """Say why batches of text of this size cannot be prepared in a host's memory, in bytes."""
    if not reads_text(config):
        return []
    rows = config.train.batch_size // jax.process_count()
    needed = rows * config.data.seq_len * BYTES_OF_A_TOKEN * BATCHES_AT_ONCE
    if needed <= memory:
        return []
    most = memory // (config.data.seq_len * BYTES_OF_A_TOKEN * BATCHES_AT_ONCE)
    return [
        f"train.batch_size: got {config.train.batch_size:,}, whose batches (rows of "
        f"{config.data.seq_len} tokens) need {needed / 2**30:,.1f} GiB of memory in each process; "
        f"expected less than the {memory / 2**30:,.1f} GiB of this machine; give at most "
        f"{most * jax.process_count():,}"
    ]


def host_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def carry_out(
    job: Job,
    run: RunDirectory,
    interrupts: Interrupts,
    *,
    claimed: Callable[[], None] = lambda: None,
) -> int:
    """Make the steps of a run that are still to be made, and conclude it.

    Parameters
    ----------
    job : Job
        The parts of the run.
    run : RunDirectory
        Where it is written, and what it goes on from.
    interrupts : Interrupts
        Signals that ask to stop or to save.
    claimed : callable
        Called when no other run can write into the directory, before anything is written there.

    Returns
    -------
    int
        As `train` says, which also says what is raised.
    """
    config = job.config
    with (
        explaining_memory(job),
        open_checkpointer(config, run) as checkpointer,
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(claiming(config, run, checkpointer))
        claimed()
        watchdog = stack.enter_context(
            Watchdog(run.path, config.watchdog, process=jax.process_index())
        )
        if tjx_parallel.is_main():
            run.remove_leftovers()
        requests = Requests(interrupts)
        course = Course(job, run, checkpointer, requests, watchdog)
        with interrupts.leaving_at_once():
            state = course.resume()
        state = course.follow(state)
        if requests.stop:
            step = int(jax.device_get(state.step))
            say(
                f"stopped and saved at step {step}; "
                f"to go on: --run_dir {run.path} and the same flags"
            )
            return 128 + requests.stop
        watchdog.beat("sample", config.train.max_steps)
        with interrupts.leaving_at_once():
            conclude(course, state)
    return 0


@contextlib.contextmanager
def claiming(
    config: Config, run: RunDirectory, checkpointer: tjx_ckpt.Checkpointer
) -> Iterator[None]:
    """Let no other run write into the run directory, nor where the checkpoints lie.

    Raises
    ------
    tjx_ckpt.DirectoryInUseError
        If another run does.
    tjx_ckpt.ClaimError, tjx_ckpt.StorageError
        If a directory cannot be locked.
    """
    with contextlib.ExitStack() as stack:
        if config.checkpoint.directory is not None:
            # Runs with one run directory and two directories of checkpoints exclude each other.
            stack.enter_context(tjx_ckpt.Checkpointer(run.checkpoints)).claim()
        checkpointer.claim()
        yield


@contextlib.contextmanager
def open_checkpointer(config: Config, run: RunDirectory) -> Iterator[tjx_ckpt.Checkpointer]:
    """Open the checkpoints of a run, and wait for the last save at the end.

    For somebody who has pressed Ctrl-C twice nobody waits: what is being saved is then left as a
    kill would leave it, and the next start tidies up.
    """
    choices = config.checkpoint
    checkpointer = tjx_ckpt.Checkpointer(
        run.place_of_checkpoints(config),
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
        # What ends the run comes first: a save that fails beside it is in the log.
        with contextlib.suppress(tjx_ckpt.SaveError):
            checkpointer.close()
        raise
    checkpointer.close()


def take_run_dir(job: Job) -> RunDirectory:
    """Make the run directory where it is missing; process 0 does so.

    Raises
    ------
    ConfigError
        If it cannot be made, or several processes were not told one directory.
    """
    config = job.config
    if jax.process_count() == 1:
        return make_run_dir(config)
    if config.run_dir is None:
        raise ConfigError(["run_dir is none: processes that train together need to be given one"])
    tjx_parallel.meet("checked")  # nobody takes what process 0 writes for another's
    run = make_run_dir(config) if tjx_parallel.is_main() else RunDirectory(Path(config.run_dir))
    tjx_parallel.meet("run directory")
    return run


def record_run(job: Job, run: RunDirectory) -> None:
    """Write to a claimed run directory what the run is made of; process 0 does so.

    Raises
    ------
    ConfigError
        If another run has written there before this one claimed it.
    """
    if tjx_parallel.is_main():
        config = replace(job.config, run_dir=str(run.path))
        refuse_other_data(job)
        open_run(config)
        job.task.record(run)
        run.point_to_data(job.task.folders, identity=data_identity(job.task))
    tjx_parallel.meet("recorded")


def prepare(config: Config) -> Job:
    """Open the data, fit the model to them, and build the parts of the run."""
    if jax.process_count() > 1 and config.train.sample_tokens:
        say("no sample      several processes write none: see `generate` of apps/eval")
        config = replace(config, train=replace(config.train, sample_tokens=0))
    try:
        with PreparationBar() as bar:
            config, make_task = open_task(config, bar)
        job = build_job(config, make_task)
        tjx_parallel.require_equal("data", data_identity(job.task))
    except (tjx_data.HubError, tjx_data.DataError):
        raise
    except ValueError as error:
        raise ConfigError(str(error).splitlines()) from error
    say(f"data           {job.task.introduction}")
    say(
        f"model          {tjx_nn.count_params(config.model):,} parameters on "
        f"{job.mesh.size} {job.mesh.devices.flat[0].device_kind}"
    )
    say(f"layers         {describe_layers(job)}")
    say(f"training       {describe_training(job)}")
    if flags := os.environ.get("XLA_FLAGS"):
        say(f"XLA flags      {flags}")
    return job


def describe_layers(job: Job) -> str:
    """Say whether the blocks are compiled as a loop or unrolled, and who decided it."""
    model = job.config.model
    count = model.n_layer // (job.mesh.shape["stage"] * job.config.mesh.chunks_per_stage)
    how = "compiled as a loop" if runs_as_loop(model, count) else "unrolled"
    if model.scan_layers is not None:
        return f"{model.n_layer} blocks {how}, as model.scan_layers says"
    if how == "unrolled":
        return (
            f"{model.n_layer} blocks {how}, the default on this platform; "
            "--model.scan_layers true compiles several times faster and runs slower"
        )
    return f"{model.n_layer} blocks {how}, the default for this platform and depth"


def describe_training(job: Job) -> str:
    """Say how a run trains, in half a line."""
    config = job.config
    pieces = "" if job.accumulation == 1 else f" in {job.accumulation} pieces"
    what = "sequences" if reads_text(config) else "examples"
    return (
        f"{config.train.max_steps:,} steps of {config.train.batch_size:,} {what}{pieces} in "
        f"{config.train.precision}; {config.optimizer.name}, {config.schedule.name} with a peak of "
        f"{config.optimizer.learning_rate:g}"
    )


def refuse_other_data(job: Job) -> None:
    """Refuse to go on with a run on other data, another tokenizer or another order of batches.

    Raises
    ------
    ConfigError
        If anything that decides the batches is not what it was; what differs is named.
    """
    run = None if job.config.run_dir is None else RunDirectory(Path(job.config.run_dir))
    before = None if run is None else run.data_pointer()
    if before is None:
        return
    was, now = before.identity, data_identity(job.task)
    changed = [
        f"{name} was {was.get(name, 'not there')} and is {now.get(name, 'not there')}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError([
            f"--run_dir {job.config.run_dir}: the data changed since this run was started "
            f"({'; '.join(changed)}): put back what it was, or give another --run_dir"
        ])  # fmt: skip


def draw_loss(run: RunDirectory) -> str:
    """Draw the loss curve; return its place, or why there is none: the run is saved by now."""
    try:
        run.plots.mkdir(exist_ok=True)
        tjx_metrics.plot_loss(run.metrics, run.plots / "loss.png")
    except Exception as error:  # a full disk, a damaged record, a font that is missing
        return f"none: {type(error).__name__}: {error}"
    return str(run.plots / "loss.png")


def conclude(course: Course, state: TrainState) -> None:
    """Draw the loss curve and print what came out of the run; all processes compute it."""
    job, run = course.job, course.run
    lines = job.task.conclusion(job.params_to_use(state), course.found)
    if not tjx_parallel.is_main():
        return
    lines += [
        *describe_results(job.config, course.results),
        f"loss curve       {draw_loss(run)}",
        f"checkpoints      {run.place_of_checkpoints(job.config)}",
        f"metrics          {run.metrics}",
    ]
    if job.config.model.family == "gpt":
        lines.append(f"more text        ./pants run apps/eval -- generate {run.path} --prompt TEXT")
    sys.stdout.write(printable("\n".join(["", *lines]) + "\n"))
