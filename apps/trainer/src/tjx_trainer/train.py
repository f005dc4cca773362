"""One run: from a configuration to a finished run directory, or on from where it stopped."""

import contextlib
import sys
from pathlib import Path

import jax

import tjx_ckpt
import tjx_data
import tjx_metrics
import tjx_nn
import tjx_parallel
from tjx_trainer.allocator import keep_freed_memory
from tjx_trainer.config import Config, ConfigError, reads_text
from tjx_trainer.exit_codes import NotFiniteError
from tjx_trainer.interrupt import StopRequest
from tjx_trainer.job import Job, build_job
from tjx_trainer.loop import run_steps
from tjx_trainer.preparing import PreparationBar
from tjx_trainer.progress import Progress
from tjx_trainer.run_dir import RunDirectory, check_run, open_run
from tjx_trainer.state import TrainState
from tjx_trainer.task import data_identity
from tjx_trainer.task_table import open_task


def train(config: Config) -> int:
    """Train, or go on where the run directory stopped.

    Parameters
    ----------
    config : Config
        From the command line.

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
        If there are checkpoints and none is sound, or another process saves there.
    NotFiniteError
        If too many steps in a row were not finite; a note names the last good checkpoint.
    """
    tjx_parallel.initialize()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    if reads_text(config) and (problems := tjx_data.find_problems(config.data)):
        raise ConfigError(problems)
    check_run(config)  # before minutes are spent on the data
    job = prepare(config)
    refuse_other_data(job)
    run = open_run(job.config)
    if tjx_parallel.is_main():
        job.task.record(run)
        run.point_to_data(job.task.folders, identity=data_identity(job.task))
    say(f"run directory  {run.path}")
    with (
        StopRequest() as stop,
        contextlib.closing(
            tjx_ckpt.Checkpointer(run.checkpoints, keep=config.checkpoint.keep)
        ) as checkpointer,
    ):
        state = resume(job, checkpointer)
        start = int(jax.device_get(state.step))
        throughput = tjx_metrics.Throughput(max_steps=job.config.train.max_steps, start_step=start)
        tracker = make_tracker(job, run, start, throughput)
        progress = Progress(
            tracker,
            throughput,
            every=config.log.every,
            max_skipped=config.guard.max_skipped,
            skipped=int(jax.device_get(state.guard.skipped)),
        )
        try:
            state = run_steps(
                job, state, progress=progress, checkpointer=checkpointer, stopping=stop
            )
        except NotFiniteError as error:
            error.add_note(after_divergence(run, checkpointer))
            raise
        finally:
            tracker.finish()
        if stop() and int(jax.device_get(state.step)) < config.train.max_steps:
            say(
                f"stopped and saved at step {int(jax.device_get(state.step))}; "
                f"to go on: --run_dir {run.path} and the same flags"
            )
            return stop.exit_code
        if tjx_parallel.is_main():
            conclude(job, run, state, progress, throughput)
    return 0


def prepare(config: Config) -> Job:
    """Open the data, fit the model to them, and build the parts of the run."""
    try:
        with PreparationBar() as bar:
            config, make_task = open_task(config, bar)
        job = build_job(config, make_task)
    except tjx_data.HubError:
        raise
    except ValueError as error:
        raise ConfigError(str(error).splitlines()) from error
    say(f"data           {job.task.introduction}")
    say(
        f"model          {tjx_nn.count_params(config.model):,} parameters on "
        f"{job.mesh.size} {job.mesh.devices.flat[0].device_kind}"
    )
    say(f"training       {describe_training(job)}")
    return job


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


def after_divergence(run: RunDirectory, checkpointer: tjx_ckpt.Checkpointer) -> str:
    """Name the last good checkpoint, and say what helps."""
    checkpointer.wait()
    step = checkpointer.latest_step()
    last = (
        "nothing was saved before it"
        if step is None
        else f"the last good checkpoint is that of step {step} in {run.checkpoints}"
    )
    return (
        f"{last}; in another --run_dir try a lower --optimizer.learning_rate, a longer "
        "--schedule.warmup_steps or a smaller --optimizer.clip_norm"
    )


def resume(job: Job, checkpointer: tjx_ckpt.Checkpointer) -> TrainState:
    """Return the newest sound state, or that of step 0 where nothing was saved.

    Raises
    ------
    tjx_ckpt.CheckpointError
        If there are checkpoints, and none is sound.
    """
    if not checkpointer.steps():
        return job.initial_state()
    state: TrainState = checkpointer.restore(job.abstract)
    say(f"resuming       from step {int(jax.device_get(state.step))}")
    return state


def make_tracker(
    job: Job, run: RunDirectory, start: int, throughput: tjx_metrics.Throughput
) -> tjx_metrics.CompositeTracker:
    """Return where the numbers go; nowhere but on process 0."""
    if not tjx_parallel.is_main():
        return tjx_metrics.CompositeTracker([])
    return tjx_metrics.CompositeTracker([
        # Evaluations of step 0 come before anything is saved: they are made again.
        tjx_metrics.JsonlTracker(run.metrics, resume_step=start if start else -1),
        tjx_metrics.ConsoleTracker(
            job.config.train.max_steps, start_step=start, throughput=throughput
        ),
    ])  # fmt: skip


def conclude(
    job: Job,
    run: RunDirectory,
    state: TrainState,
    progress: Progress,
    throughput: tjx_metrics.Throughput,
) -> None:
    """Draw the loss curve and print what came out of the run."""
    run.plots.mkdir(exist_ok=True)
    tjx_metrics.plot_loss(run.metrics, run.plots / "loss.png")
    params = job.params_to_use(state)
    found = (progress.last_evaluation or job.evaluate(params)).metrics()
    lines = job.task.conclusion(params, found)
    if (rate := throughput.mean_tokens_per_sec) is not None:
        what = "tokens" if reads_text(job.config) else "labels"
        lines.append(f"{what} a second  {rate:,.0f}")
    lines += [
        f"loss curve       {run.plots / 'loss.png'}",
        f"checkpoints      {run.checkpoints}",
        f"metrics          {run.metrics}",
    ]
    if job.config.model.family == "gpt":
        lines.append(f"more text        ./pants run apps/eval -- generate {run.path} --prompt TEXT")
    sys.stdout.write("\n".join(["", *lines]) + "\n")


def say(text: str) -> None:
    """Tell the user where the run stands; standard output is for results."""
    if tjx_parallel.is_main():
        sys.stderr.write(text + "\n")
