"""The training loop."""

from collections.abc import Callable
from functools import partial

import jax

import tjx_ckpt
import tjx_data
from tjx_trainer.evaluation import Evaluation
from tjx_trainer.job import Job
from tjx_trainer.progress import Progress
from tjx_trainer.state import TrainState
from tjx_trainer.step import Batch
from tjx_trainer.task import data_identity


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

    Raises
    ------
    NotFiniteError
        When as many steps in a row were not finite as the guard allows.
    """
    train, save_every = job.config.train, job.config.checkpoint.every
    first = step = int(jax.device_get(state.step))

    def load(step: int) -> Batch:
        with jax.transfer_guard("disallow"):  # each thread has its own
            return job.task.batch(step, job.put)

    def evaluate(state: TrainState) -> Evaluation:
        return job.evaluate(job.params_to_use(state))

    with (
        jax.transfer_guard("disallow"),
        tjx_data.Prefetcher(load, first=first, stop=train.max_steps) as batches,
    ):
        if first == 0:
            progress.evaluate(0, partial(evaluate, state))
        while step < train.max_steps and not stopping():
            state, metrics = job.train_step(state, batches.get(step))
            step += 1
            progress.stepped(step, metrics, waited=batches.take_waited())
            if step == train.max_steps or step % train.eval_every == 0:
                progress.evaluate(step, partial(evaluate, state))
            if step % save_every == 0:
                progress.flush()  # a run that goes on from here lacks no record
                checkpointer.save(step, state, metadata=data_identity(job.task))
    progress.flush()
    if step > first and step % save_every != 0:
        checkpointer.save(step, state, metadata=data_identity(job.task))
    checkpointer.wait()
    return state
