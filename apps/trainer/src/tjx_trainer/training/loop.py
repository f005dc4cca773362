"""The training loop."""

from collections.abc import Mapping

import jax

import tjx_data
import tjx_metrics
from tjx_trainer.runtime.preemption import PreemptionSync
from tjx_trainer.runtime.watchdog import Watchdog
from tjx_trainer.training.build import Job
from tjx_trainer.training.checkpointing import CheckpointSaver
from tjx_trainer.training.eval_hooks import EvalHooks
from tjx_trainer.training.gradients import Batch
from tjx_trainer.training.metrics_logger import MetricsLogger
from tjx_trainer.training.train_state import TrainState


def train_loop(
    job: Job,
    state: TrainState,
    *,
    progress: MetricsLogger,
    saver: CheckpointSaver,
    preemption: PreemptionSync,
    watchdog: Watchdog,
    profiler: tjx_metrics.Profiler,
    evaluation_pending: bool = False,
) -> TrainState:
    """Train from the state's step to the last, or until asked to stop; the end is saved.

    Parameters
    ----------
    job : Job
        The parts of the run.
    state : TrainState
        Where to start; its buffers are donated.
    progress : Progress
        Reads each step's metrics one step late, so that the devices never wait for the host.
    saver : Saver
        Saves in the background.
    requests : Requests
        Whether somebody has asked to stop or to save.
    watchdog : Watchdog
        Told of each step and each evaluation batch.
    profiler : tjx_metrics.Profiler
        Traces the steps that it was told to.
    owes_evaluation : bool
        Whether the looks at the state's step, its evaluation above all, are still to be taken.

    Returns
    -------
    TrainState
        The state after the last step made.

    Raises
    ------
    NotFiniteError
        When as many steps in a row were not finite as the guard allows.
    tjx_ckpt.SaveError
        When a save failed, and the run is not to go on, or it was the last one.
    """
    max_steps, save_every = job.config.train.max_steps, job.config.checkpoint.every
    step_timer, eval_hooks = (
        progress.step_timer,
        EvalHooks(job, progress, saver, preemption, watchdog),
    )
    first = step = int(jax.device_get(state.step))
    owed = evaluation_pending
    # What is saved in a streak of steps that are not finite may be bad, and would take the place of
    # a good checkpoint: a save that is due then waits for the end of the streak.
    deferred = int(jax.device_get(state.guard.skipped_in_a_row)) > 0

    def load(step: int) -> Batch:
        with jax.transfer_guard("disallow"):  # each thread has its own
            return job.task.batch(step, job.put)

    with (
        jax.transfer_guard("disallow"),
        tjx_data.Prefetcher(load, first=first, stop=max_steps) as batches,
    ):
        while True:
            metrics: Mapping[str, float] | None = None
            if owed:
                metrics = eval_hooks.take(step, state)
                owed = metrics is None  # it was left: whoever goes on from here makes it
            if preemption.failed:
                saver.stop_for_failure(step)
            is_end = step == max_steps or preemption.stop > 0
            wanted = preemption.pop_save_request() or is_end or step % save_every == 0 or deferred
            if wanted and step > first:
                watchdog.beat("save", step)
                progress.flush()  # a run that goes on from here lacks no record
                deferred = progress.in_nonfinite_streak and not is_end
                if not deferred:
                    with step_timer.during("checkpoint"):
                        saver.save(
                            step, state, metrics=metrics, evaluation_pending=owed,
                            prune=not progress.in_nonfinite_streak,
                        )  # fmt: skip
            if is_end:
                break
            watchdog.beat("train", step)
            with step_timer.during("data_wait"):
                batch = batches.get(step)
            with profiler.step(step + 1, wait=progress.flush):
                with step_timer.during("dispatch"):
                    state, measured = job.train_step(state, batch)
                step += 1
                progress.record_step(step, measured, spreads=eval_hooks.weights(step, state.params))
            saver.look(step)
            preemption.poll(failed=saver.failed)
            owed = eval_hooks.due(step)
    watchdog.beat("save", step)
    saver.finish(step)
    return state
