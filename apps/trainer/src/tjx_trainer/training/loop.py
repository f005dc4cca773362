"""Training loop: load, step, evaluate, save."""

from collections.abc import Mapping
from typing import Any

import jax

import tjx_data
import tjx_metrics
from tjx_trainer.runtime.allocator import programs_run_inline
from tjx_trainer.runtime.preemption import PreemptionSync
from tjx_trainer.runtime.watchdog import Watchdog
from tjx_trainer.training.build import Job
from tjx_trainer.training.checkpointing import CheckpointSaver
from tjx_trainer.training.eval_hooks import EvalHooks
from tjx_trainer.training.metrics_logger import MetricsLogger
from tjx_trainer.training.train_state import TrainState


def train_loop(
    job: Job,
    state: TrainState,
    *,
    logger: MetricsLogger,
    saver: CheckpointSaver,
    preemption: PreemptionSync,
    watchdog: Watchdog,
    profiler: tjx_metrics.Profiler,
    evaluation_pending: bool = False,
) -> TrainState:
    """Run training steps until ``train.max_steps`` or a stop request, then save.

    Parameters
    ----------
    job : Job
        The components of the run.
    state : TrainState
        The initial state; its buffers are donated.
    logger : MetricsLogger
        Reads the metrics of each step one step late, so that the devices never wait for the host;
        where programs run inline, at once, so that throughput counts the step when it ends.
    saver : CheckpointSaver
        Saves in the background.
    preemption : PreemptionSync
        Stop and save requests, equal in all processes.
    watchdog : Watchdog
        Receives a heartbeat before each step, evaluation batch and save.
    profiler : tjx_metrics.Profiler
        Traces the steps of ``profile.steps``.
    evaluation_pending : bool
        Whether the evaluation hooks of the initial state's step are still to be run.

    Returns
    -------
    TrainState
        The state after the last step.

    Raises
    ------
    NotFiniteError
        If ``guard.max_skipped`` consecutive steps were not finite.
    tjx_ckpt.SaveError
        If a save failed and ``checkpoint.on_error`` is "stop", or if the final save failed.
    """
    max_steps, save_every = job.config.train.max_steps, job.config.checkpoint.every
    step_timer = logger.step_timer
    train_steps = {
        id(each): tjx_metrics.watch_recompiles(each.train_step, "the training step")
        for each in (job, *job.phases.values())
    }
    eval_hooks = EvalHooks(job, logger, saver, preemption, watchdog)
    first = step = int(jax.device_get(state.step))
    owed = evaluation_pending
    inline = programs_run_inline()
    # Do not save during a streak of non-finite steps: a bad checkpoint would displace a good one. A
    # save that becomes due then is deferred to the end of the streak.
    deferred = int(jax.device_get(state.guard.skipped_in_a_row)) > 0

    def load(step: int) -> Any:
        phase = job.at(step)
        rows = phase.rows(step)
        if phase.complete_batch is not None:
            return rows
        with jax.transfer_guard("disallow"):  # the guard is thread-local
            return job.put(rows)

    with (
        jax.transfer_guard("disallow"),
        tjx_data.Prefetcher(load, first=first, stop=max_steps) as batches,
    ):
        while True:
            metrics: Mapping[str, float] | None = None
            if owed:
                metrics = eval_hooks.run(step, state)
                owed = metrics is None  # interrupted: the resumed run repeats it
            if preemption.failed:
                saver.stop_for_failure(step)
            is_end = step == max_steps or preemption.stop > 0
            wanted = preemption.pop_save_request() or is_end or step % save_every == 0 or deferred
            if wanted and step > first:
                watchdog.beat("save", step)
                logger.flush()  # metrics.jsonl holds every step up to the checkpoint
                deferred = logger.in_nonfinite_streak and not is_end
                if not deferred:
                    with step_timer.during("checkpoint"):
                        saver.save(
                            step, state, metrics=metrics, evaluation_pending=owed,
                            prune=not logger.in_nonfinite_streak,
                        )  # fmt: skip
            if is_end:
                break
            phase = job.at(step)
            # The first step of a phase compiles: another kind of work for the watchdog.
            kind = "train" if phase is job else f"train from step {phase.first_step}"
            watchdog.beat(kind, step)
            with step_timer.during("data_wait"):
                while not batches.wait(1.0) and not preemption.stops_waiting():
                    pass
                if preemption.stop:
                    continue
                batch = batches.get(step)
                completed: Mapping[str, float] = {}
                if phase.complete_batch is not None:
                    batch, completed = phase.complete_batch(step, batch, state)
            with profiler.step(step + 1, wait=logger.flush):
                with step_timer.during("dispatch"):
                    state, metrics_on_device = train_steps[id(phase)](state, batch)
                step += 1
                spreads = eval_hooks.weights(step, state.params)
                logger.record_step(step, {**metrics_on_device, **completed}, spreads=spreads)
                if inline:
                    logger.flush()
            saver.poll(step)
            preemption.poll(failed=saver.failed)
            owed = eval_hooks.due(step)
    watchdog.beat("save", step)
    saver.finish(step)
    return state
