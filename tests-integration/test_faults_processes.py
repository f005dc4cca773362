"""Processes that train together: what happens to one of them, all answer to.

One process with eight devices does what four with two do, bit for bit. It is told that it is one of
one: it then adds up over its devices with Gloo, as several processes do, in the same order.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from campaigns.outcome import describe_difference, numbers, outcome
from campaigns.tiny_run import Life, TinyRun

pytest_plugins = ["fault_fixtures"]

NewRun = Callable[..., TinyRun]

DEVICES = 8
TERMINATED = 143
STEPS = 16
HEARTBEAT_SECONDS = 10

# Processes that share two cores take a second a step: few steps of a smaller model.
SMALLER: dict[str, Any] = {
    "model_n_layer": 1, "model_d_model": 16, "model_vocab_size": 64, "train_max_steps": STEPS,
    "train_eval_every": 10, "checkpoint_every": 4, "mesh_data": 2, "mesh_fsdp": 2, "mesh_tensor": 2,
    "distributed_heartbeat_timeout": HEARTBEAT_SECONDS,
}  # fmt: skip
HOW_TO_GO_ON = "To resume from the newest, start all processes again"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def together(run: TinyRun, count: int) -> Iterator[list[Life]]:
    """Start the processes of a run, told of each other by flags; none of them outlives the test."""
    address = f"127.0.0.1:{free_port()}"
    lives = [
        run.elsewhere(
            run.folder,
            distributed_coordinator=address,
            distributed_num_processes=count,
            distributed_process_id=index,
        ).start(JAX_NUM_CPU_DEVICES=str(DEVICES // count))
        for index in range(count)
    ]
    try:
        yield lives
    finally:
        for life in lives:
            life.kill()


def finish(run: TinyRun, count: int) -> None:
    with together(run, count) as lives:
        codes = [life.wait() for life in lives]
        assert codes == [0] * count, "\n".join(life.printed for life in lives)


def wait_for_another_checkpoint(run: TinyRun, life: Life) -> None:
    before = max(run.saved(), default=0)
    life.wait_until(lambda: max(run.saved(), default=0) > before, f"a step after {before}")


@pytest.fixture(scope="module")
def whole(undisturbed: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run of one process that nobody disturbed."""
    run = undisturbed.elsewhere(tmp_path_factory.mktemp("whole"), **SMALLER)
    finish(run, 1)
    return run


def assert_equal_bit_for_bit(run: TinyRun, whole: TinyRun) -> None:
    """Compare what came out; each process has a heartbeat file, so the names may differ."""
    wanted = outcome(whole.run_dir)
    found = dataclasses.replace(outcome(run.run_dir), files=wanted.files)
    assert describe_difference(found, wanted) == []


def stop_one(run: TinyRun, count: int) -> None:
    """Let one of the processes be asked to stop while they train: all save the same step."""
    with together(run, count) as lives:
        wait_for_another_checkpoint(run, lives[0])
        lives[-1].signal(signal.SIGTERM)
        assert [life.wait() for life in lives] == [TERMINATED] * count, lives[-1].printed
        # A checkpoint is only there when all have written their parts of the same step.
        stopped_at = run.saved()[-1]
        assert 4 <= stopped_at < STEPS
        assert f"stopped by SIGTERM after saving step {stopped_at};" in lives[0].printed
        # Process 0 speaks for all. What the others print is Gloo's.
        others = [line for life in lives[1:] for line in life.printed.splitlines()]
        assert [line for line in others if "connected" not in line] == []


def lose_one(run: TinyRun, count: int, number: signal.Signals) -> None:
    """Let one of the processes be killed or stopped while they train; the others must end."""
    with together(run, count) as lives:
        wait_for_another_checkpoint(run, lives[0])
        lives[1].signal(number)
        begin = time.monotonic()
        others = [life for life in lives if life is not lives[1]]
        assert 0 not in [life.wait() for life in others]
        # Two heartbeats, and what a busy machine takes to end processes.
        assert time.monotonic() - begin < 2 * HEARTBEAT_SECONDS + 20
        for life in others:  # it is said once they are gone
            deadline = time.monotonic() + HEARTBEAT_SECONDS
            while HOW_TO_GO_ON not in life.printed and time.monotonic() < deadline:
                time.sleep(0.01)
            assert f"{HOW_TO_GO_ON} with --run_dir {run.folder / 'run'}" in life.printed


def test_four_are_asked_to_stop_one_of_two_is_killed_and_one_ends_it_exactly(
    new_run: NewRun, whole: TinyRun
) -> None:
    run = new_run(**SMALLER)
    stop_one(run, 4)
    lose_one(run, 2, signal.SIGKILL)
    finish(run, 1)
    assert_equal_bit_for_bit(run, whole)


@pytest.mark.slow
def test_a_process_that_answers_no_more_ends_the_others(new_run: NewRun, whole: TinyRun) -> None:
    run = new_run(**SMALLER)
    lose_one(run, 4, signal.SIGSTOP)
    lose_one(run, 4, signal.SIGKILL)
    finish(run, 4)
    assert_equal_bit_for_bit(run, whole)


@pytest.mark.slow
def test_each_process_starts_again_by_itself(new_run: NewRun, whole: TinyRun) -> None:
    run = new_run(**SMALLER)
    supervised = dataclasses.replace(run, module=(*run.module, "--supervise"))
    with together(supervised, 2) as lives:
        wait_for_another_checkpoint(run, lives[0])
        beat = json.loads((run.run_dir / "heartbeat-process-1.json").read_text())
        os.kill(beat["pid"], signal.SIGKILL)
        assert [life.wait() for life in lives] == [0, 0], lives[1].printed
    assert "supervisor: restarting in" in lives[0].printed
    assert_equal_bit_for_bit(run, whole)


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_fewer_devices_go_on_with_the_batches_of_eight(
    new_run: NewRun, whole: TinyRun, devices: int
) -> None:
    mesh = {"mesh_data": 1, "mesh_fsdp": devices, "mesh_tensor": 1}
    run = new_run(**{**SMALLER, **mesh})
    shutil.copytree(whole.run_dir, run.run_dir)
    for step in run.saved()[1:]:  # what eight saved last
        shutil.rmtree(run.checkpoints / str(step))
    first = run.saved()[0]
    assert f"from step {first}" in run.finish(JAX_NUM_CPU_DEVICES=str(devices))
    found, wanted = numbers(run.run_dir), numbers(whole.run_dir)
    assert found.keys() == wanted.keys()
    losses = [key for key in found if key[1].endswith("loss") and key[0] > first]
    assert len(losses) > STEPS - first
    for key in losses:
        np.testing.assert_allclose(float(found[key]), float(wanted[key]), rtol=1e-5)
