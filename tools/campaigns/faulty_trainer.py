"""Trainer with injected faults: arguments are pairs of FAULT AT_STEP, then the trainer's flags.

Faults that cannot be injected from outside the process, such as a NaN gradient, are injected into
the functions of the trainer. AT_STEP is the number of a training step, from 1.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

import tjx_data
import tjx_optim
from tjx_trainer import main as program
from tjx_trainer.training import train
from tjx_trainer.training.build import Job

DAY = 86400.0


def nan_gradient(at: int) -> None:
    """Set one element of the gradients of a step to NaN, inside the jitted step."""
    accumulate = tjx_optim.accumulate_gradients

    def poisoned(loss: Any, params: Any, microbatches: Any, **options: Any) -> Any:
        total = accumulate(loss, params, microbatches, **options)
        # Dropout keys are a function of the step and identify it.
        keys = microbatches["dropout_key"]
        of_the_step = jax.random.fold_in(jax.random.key(0), at)
        wanted = jax.random.split(of_the_step, keys.shape[0])
        hit = (jax.random.key_data(keys) == jax.random.key_data(wanted)).all()
        scale = total.gradients["ln_f"]["scale"]
        broken = scale.at[3].set(jnp.where(hit, jnp.nan, scale[3]))
        ln_f = {**total.gradients["ln_f"], "scale": broken}
        return total._replace(gradients={**total.gradients, "ln_f": ln_f})

    vars(tjx_optim)["accumulate_gradients"] = poisoned


def nan_parameter(at: int) -> None:
    """Set a parameter to NaN before a step, once: all later steps are non-finite."""
    once = iter([True])
    _before_step(lambda step: step == at and next(once, False), _with_nan)


def nan_parameter_again(at: int) -> None:
    """Set a parameter to NaN before every execution of a step, also after a rollback."""
    _before_step(lambda step: step == at, _with_nan)


def clock(at: int) -> None:
    """Set the clock back by a day before a step."""
    real_time = time.time

    def jump(state: Any) -> Any:
        vars(time)["time"] = lambda: real_time() - DAY
        return state

    _before_step(lambda step: step == at, jump)


def hang(at: int) -> None:
    """Block forever at the batch of a step, as an unresponsive disk does."""

    def answer(step: int) -> None:
        while step == at:
            time.sleep(3600)

    _before_batch(answer)


def worker(at: int) -> None:
    """Raise an unexpected error in the thread that reads the data."""

    def answer(step: int) -> None:
        if step == at:
            raise RuntimeError("the worker is dead")

    _before_batch(answer)


def slow_disk(at: int) -> None:
    """Delay each fsync by a fifth of a second from a step on, so that saves take seconds."""
    flush = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.2)
        flush(descriptor)

    def begin(state: Any) -> Any:
        vars(os)["fsync"] = slow
        return state

    _before_step(lambda step: step == at, begin)


def gates(at: int) -> None:
    """Wait for a file ``gate-STEP`` in the folder before every tenth step from this one.

    A file ``at-gate-STEP`` says that the run waits.
    """

    def wait(state: Any) -> Any:
        coming = int(jax.device_get(state.step)) + 1
        Path(f"at-gate-{coming}").touch()
        while not Path(f"gate-{coming}").exists():
            time.sleep(0.01)
        return state

    _before_step(lambda step: step >= at and (step - at) % 10 == 0, wait)


def held_evaluation(at: int) -> None:
    """Wait for a file ``gate-evaluation`` within each evaluation from a step on."""
    begun = False

    def begin(state: Any) -> Any:
        nonlocal begun
        begun = True
        return state

    def hold(job: Job) -> Job:
        def add(sums: Any, params: Any, batch: Any) -> Any:
            while begun and not Path("gate-evaluation").exists():
                time.sleep(0.01)
            return job.eval_step.add(sums, params, batch)

        return replace(job, eval_step=job.eval_step._replace(add=add))

    _before_step(lambda step: step == at, begin)
    _change_job(hold)


def _with_nan(state: Any) -> Any:
    leaf = state.params["ln_f"]["scale"]
    scale = np.array(jax.device_get(leaf))
    scale[3] = np.nan
    ln_f = {**state.params["ln_f"], "scale": jax.device_put(scale, leaf.sharding)}
    return state._replace(params={**state.params, "ln_f": ln_f})


def _before_step(due: Callable[[int], bool], change: Callable[[Any], Any]) -> None:
    """Change the state before the given steps."""

    def change_step(job: Job) -> Job:
        def faulty(state: Any, batch: Any) -> Any:
            if due(int(jax.device_get(state.step)) + 1):
                state = change(state)
            return job.train_step(state, batch)

        return replace(job, train_step=faulty)

    _change_job(change_step)


def _change_job(change: Callable[[Job], Job]) -> None:
    """Change the job after it is built, in addition to earlier changes."""
    build: Callable[..., Job] = vars(train)["build_job"]
    vars(train)["build_job"] = lambda *arguments: change(build(*arguments))


def _before_batch(happen: Callable[[int], None]) -> None:
    """Call a function before the batch of a step is read, at least once."""

    def add(loader: type[tjx_data.Loader]) -> None:
        batch = loader.batch

        def faulty(self: Any, step: int) -> Any:
            happen(step + 1)
            return batch(self, step)

        setattr(loader, "batch", faulty)  # noqa: B010  mypy knows it as a method

    for loader in (tjx_data.Loader, tjx_data.TokenLoader):  # both define it
        add(loader)


FAULTS: Mapping[str, Callable[[int], None]] = {
    fault.__name__: fault
    for fault in (
        nan_gradient,
        nan_parameter,
        nan_parameter_again,
        clock,
        hang,
        worker,
        slow_disk,
        gates,
        held_evaluation,
    )
}


def run_faulty(words: Sequence[str]) -> NoReturn:
    """Inject the faults of the first arguments and run the trainer with the others."""
    faults, sys.argv[1:] = split_words(words)
    for fault, at in itertools.batched(faults, 2):
        FAULTS[fault](int(at))
    program.run()


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into those of the faults and those of the trainer."""
    end = 0
    while words[end] in FAULTS:
        end += 2
    return list(words[:end]), list(words[end:])


if __name__ == "__main__":
    run_faulty(sys.argv[1:])
