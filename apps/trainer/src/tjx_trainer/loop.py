"""The training loop."""

from collections.abc import Callable
from functools import partial

import jax

import tjx_ckpt
from tjx_trainer.job import Job
from tjx_trainer.progress import Progress
from tjx_trainer.state import TrainState


def run_steps(
    job: Job,
    state: TrainState,
    *,
    progress: Progress,
    checkpointer: tjx_ckpt.Checkpointer,
    stopping: Callable[[], bool],
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
    checkpointer : tjx_ckpt.Checkpointer
        Saves in the background.
    stopping : callable
        Whether somebody has asked to stop.

    Returns
    -------
    TrainState
        The state after the last step made.
    """
    train, save_every = job.config.train, job.config.checkpoint.every
    first = step = int(jax.device_get(state.step))
    with jax.transfer_guard("disallow"):
        if first == 0:
            progress.evaluate(0, partial(job.evaluate, state.params))
        while step < train.max_steps and not stopping():
            state, metrics = job.train_step(state, job.task.batch(step, job.put))
            step += 1
            progress.stepped(step, metrics)
            if step == train.max_steps or step % train.eval_every == 0:
                progress.evaluate(step, partial(job.evaluate, state.params))
            if step % save_every == 0:
                progress.flush()  # a run that goes on from here lacks no record
                checkpointer.save(step, state, metadata=job.task.fingerprints)
    progress.flush()
    if step > first and step % save_every != 0:
        checkpointer.save(step, state, metadata=job.task.fingerprints)
    checkpointer.wait()
    return state
