"""Four processes that train together: what happens to one of them, all answer to."""

import contextlib
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from campaigns.outcome import describe_difference, numbers, outcome
from campaigns.tiny_run import Life, TinyRun

pytest_plugins = ["fault_fixtures"]

NewRun = Callable[..., TinyRun]

COUNT = 4
TERMINATED = 143
STEPS = 16
HEARTBEAT_SECONDS = 10

# Processes that share two cores take a second a step: few steps of a smaller model.
SMALLER: dict[str, Any] = {
    "model_n_layer": 1, "model_d_model": 16, "train_max_steps": STEPS, "train_eval_every": 10,
    "checkpoint_every": 4, "mesh_fsdp": 2,
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def together(run: TinyRun) -> Iterator[list[Life]]:
    """Start the processes of a run; none of them outlives the test."""
    address = f"127.0.0.1:{free_port()}"
    lives = [
        run.start(
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(COUNT),
            JAX_PROCESS_ID=str(index),
            TJX_HEARTBEAT_TIMEOUT=str(HEARTBEAT_SECONDS),
        )
        for index in range(COUNT)
    ]
    try:
        yield lives
    finally:
        for life in lives:
            life.kill()


def finish(run: TinyRun) -> None:
    with together(run) as lives:
        codes = [life.wait() for life in lives]
        assert codes == [0] * COUNT, "\n".join(life.printed for life in lives)


def wait_for_another_checkpoint(run: TinyRun, life: Life) -> None:
    before = max(run.saved(), default=0)
    life.wait_until(lambda: max(run.saved(), default=0) > before, f"a step after {before}")


@pytest.fixture(scope="module")
def whole(undisturbed: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run of four processes that nobody disturbed."""
    run = undisturbed.elsewhere(tmp_path_factory.mktemp("whole"), **SMALLER)
    finish(run)
    return run


def lose_one(run: TinyRun, number: signal.Signals) -> None:
    """Let one of the processes be killed or stopped while they train; the others must end."""
    with together(run) as lives:
        wait_for_another_checkpoint(run, lives[0])
        lives[1].signal(number)
        codes = [life.wait() for life in lives if life is not lives[1]]
        assert 0 not in codes


def test_asked_or_killed_one_by_one_they_stop_together_and_go_on_exactly(
    new_run: NewRun, whole: TinyRun
) -> None:
    run = new_run(**SMALLER)
    with together(run) as lives:
        wait_for_another_checkpoint(run, lives[0])
        lives[2].signal(signal.SIGTERM)
        assert [life.wait() for life in lives] == [TERMINATED] * COUNT, lives[2].printed
        # A checkpoint is only there when all have written their parts of the same step.
        stopped_at = run.saved()[-1]
        assert 4 <= stopped_at < STEPS
        assert f"step {stopped_at}" in lives[0].printed
    lose_one(run, signal.SIGKILL)
    finish(run)
    assert describe_difference(outcome(run.run_dir), outcome(whole.run_dir)) == []


@pytest.mark.slow
def test_a_process_that_answers_no_more_ends_the_others(new_run: NewRun, whole: TinyRun) -> None:
    run = new_run(**SMALLER)
    lose_one(run, signal.SIGSTOP)
    finish(run)
    assert describe_difference(outcome(run.run_dir), outcome(whole.run_dir)) == []


@pytest.mark.parametrize("devices", [1, 4])
def test_one_process_goes_on_with_the_batches_of_four(
    new_run: NewRun, whole: TinyRun, devices: int
) -> None:
    run = new_run(**{**SMALLER, "mesh_fsdp": devices})
    shutil.copytree(whole.run_dir, run.run_dir)
    for step in run.saved()[1:]:  # what four processes saved last
        shutil.rmtree(run.checkpoints / str(step))
    first = run.saved()[0]
    assert f"from step {first}" in run.finish(JAX_NUM_CPU_DEVICES=str(devices))
    found, wanted = numbers(run.run_dir), numbers(whole.run_dir)
    assert found.keys() == wanted.keys()
    losses = [key for key in found if key[1].endswith("loss") and key[0] > first]
    assert len(losses) > STEPS - first
    for key in losses:
        np.testing.assert_allclose(float(found[key]), float(wanted[key]), rtol=1e-5)
