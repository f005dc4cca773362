"""Faults of one process in a multi-process run: all processes react.

One process with eight devices and four with two give the same bits. The single process starts as
process 0 of 1, so that it too reduces over its devices with Gloo, in the same order.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import digit_environment  # noqa: F401  the environment of `GRPO`
import numpy as np
import pytest
from campaigns.outcome import describe_difference, numbers, outcome
from campaigns.tiny_run import RunProcess, TinyRun

pytest_plugins = ["fault_fixtures"]

NewRun = Callable[..., TinyRun]

DEVICES = 8
TERMINATED = 143
STEPS = 16
HEARTBEAT_SECONDS = 6

# Processes that share two cores take a second per step: few steps of a smaller model.
SMALLER: dict[str, Any] = {
    "model_n_layer": 1, "model_d_model": 16, "model_vocab_size": 64, "train_max_steps": STEPS,
    "train_accumulation": 1, "train_eval_every": 8, "train_eval_tokens": 256, "checkpoint_every": 4,
    "mesh_data": 2, "mesh_fsdp": 2, "mesh_tensor": 2,
    "distributed_heartbeat_timeout": HEARTBEAT_SECONDS,
}  # fmt: skip
GRPO: dict[str, Any] = {
    "task": "grpo", "data.corpus": "arithmetic", "data.seq_len": 24, "model.n_layer": 1,
    "model.n_head": 2, "model.d_model": 16, "model.max_seq_len": 32, "train.max_steps": 4,
    "train.batch_size": 8, "train.eval_every": 4, "train.eval_tokens": 100, "checkpoint.every": 2,
    "log.every": 1, "optimizer.learning_rate": 1e-2, "mesh.data": 2, "mesh.fsdp": 2,
    "mesh.rules": "vocab=", "rl.max_new_tokens": 5, "rl.samples_per_prompt": 4, "rl.slots": 4,
    "rl.environment": "digits", "rl.max_turns": 2, "rl.eval_prompts": 6,
}  # fmt: skip
# Gloo's threads write the parts of their lines in any order.
GLOO = re.compile(
    r"\[Gloo\] Rank|is connected to|Expected number of connected|peer ranks( is :|\.)|\d+|\s"
)
HOW_TO_GO_ON = "To resume from the newest, start all processes again"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def together(run: TinyRun, count: int, devices: int = DEVICES) -> Iterator[list[RunProcess]]:
    """Start the processes of a run, connected by flags; all end with the test."""
    address = f"127.0.0.1:{free_port()}"
    lives = [
        run.elsewhere(
            run.folder,
            distributed_coordinator=address,
            distributed_num_processes=count,
            distributed_process_id=index,
        ).start(JAX_NUM_CPU_DEVICES=str(devices // count))
        for index in range(count)
    ]
    try:
        yield lives
    finally:
        for life in lives:
            life.kill()


def finish(run: TinyRun, count: int, devices: int = DEVICES) -> None:
    with together(run, count, devices) as lives:
        codes = [life.wait() for life in lives]
        assert codes == [0] * count, "\n".join(life.printed for life in lives)


def wait_for_another_checkpoint(run: TinyRun, life: RunProcess) -> None:
    before = max(run.saved(), default=0)
    life.wait_until(lambda: max(run.saved(), default=0) > before, f"a step after {before}")


@pytest.fixture(scope="module")
def whole(compiled: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """An undisturbed run of one process."""
    run = compiled.elsewhere(tmp_path_factory.mktemp("whole"), **SMALLER)
    finish(run, 1)
    return run


def assert_equal_bit_for_bit(run: TinyRun, whole: TinyRun) -> None:
    """Compare outcomes; file names may differ, since each process has a heartbeat file."""
    wanted = outcome(whole.run_dir)
    found = dataclasses.replace(outcome(run.run_dir), files=wanted.files)
    assert describe_difference(found, wanted) == []


def stop_one(run: TinyRun, count: int) -> None:
    """Send SIGTERM to one process during training: all save the same step."""
    with together(run, count) as lives:
        wait_for_another_checkpoint(run, lives[0])
        lives[-1].signal(signal.SIGTERM)
        assert [life.wait() for life in lives] == [TERMINATED] * count, lives[-1].printed
        # A checkpoint is complete when all processes have written their shards of one step.
        stopped_at = run.saved()[-1]
        assert 4 <= stopped_at < STEPS
        assert f"stopped by SIGTERM after saving step {stopped_at};" in lives[0].printed
        # Process 0 prints for all. Other output is Gloo's.
        assert "".join(GLOO.sub("", life.printed) for life in lives[1:]) == ""


def lose_one(run: TinyRun, count: int, number: signal.Signals) -> None:
    """Kill or stop one process during training; the others must end."""
    with together(run, count) as lives:
        wait_for_another_checkpoint(run, lives[0])
        lives[1].signal(number)
        begin = time.monotonic()
        others = [life for life in lives if life is not lives[1]]
        assert 0 not in [life.wait() for life in others]
        # Two heartbeats, and the time to end processes on a busy machine.
        assert time.monotonic() - begin < 2 * HEARTBEAT_SECONDS + 20
        for life in others:  # logged before they exit
            deadline = time.monotonic() + HEARTBEAT_SECONDS
            while HOW_TO_GO_ON not in life.printed and time.monotonic() < deadline:
                time.sleep(0.01)
            assert f"{HOW_TO_GO_ON} with --run_dir {run.folder / 'run'}" in life.printed


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sigterm_and_kill_of_one_process_resume_exactly(
    new_compiled_run: NewRun, whole: TinyRun, count: int
) -> None:
    run = new_compiled_run(**SMALLER)
    stop_one(run, count)
    lose_one(run, 2, signal.SIGKILL)
    finish(run, 1)
    assert_equal_bit_for_bit(run, whole)


def test_rollouts_of_two_processes_are_those_of_one(compiled: TinyRun, tmp_path: Path) -> None:
    """Groups of samples span devices, and their environments run in both processes."""
    run, whole = (
        dataclasses.replace(
            compiled, folder=tmp_path / name, flags=GRPO,
            environment={**compiled.environment, "TJX_EXTENSIONS": "digit_environment"},
        )
        for name in ("run", "whole")
    )  # fmt: skip
    finish(whole, 1, devices=4)
    with together(run, 2, devices=4) as lives:
        wait_for_another_checkpoint(run, lives[0])
    finish(run, 1, devices=4)  # after kill -9 of both
    assert_equal_bit_for_bit(run, whole)
    found = numbers(run.run_dir)
    rewards = {value for (step, name), value in found.items() if name == "train/reward" and step}
    assert len(rewards) > 1
    turns = [float(value) for (_, name), value in found.items() if name == "train/turns"]
    assert min(turns) > 1


@pytest.mark.slow
def test_unresponsive_process_ends_the_others(new_compiled_run: NewRun, whole: TinyRun) -> None:
    run = new_compiled_run(**SMALLER)
    lose_one(run, 4, signal.SIGSTOP)
    lose_one(run, 4, signal.SIGKILL)
    finish(run, 4)
    assert_equal_bit_for_bit(run, whole)


@pytest.mark.slow
def test_each_process_is_restarted_by_its_supervisor(
    new_compiled_run: NewRun, whole: TinyRun
) -> None:
    run = new_compiled_run(**SMALLER)
    supervised = dataclasses.replace(run, module=(*run.module, "--supervise"))
    with together(supervised, 2) as lives:
        wait_for_another_checkpoint(run, lives[0])
        beat = json.loads((run.run_dir / "heartbeat-process-1.json").read_text())
        os.kill(beat["pid"], signal.SIGKILL)
        assert [life.wait() for life in lives] == [0, 0], lives[1].printed
    assert "supervisor: restarting in" in lives[0].printed
    assert_equal_bit_for_bit(run, whole)


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_fewer_devices_resume_with_the_batches_of_eight(
    new_compiled_run: NewRun, whole: TinyRun, devices: int
) -> None:
    mesh = {"mesh_data": 1, "mesh_fsdp": devices, "mesh_tensor": 1}
    run = new_compiled_run(**{**SMALLER, **mesh})
    shutil.copytree(whole.run_dir, run.run_dir)
    for step in run.saved()[1:]:  # the last checkpoint of eight devices
        shutil.rmtree(run.checkpoints / str(step))
    first = run.saved()[0]
    assert f"from step {first}" in run.finish(JAX_NUM_CPU_DEVICES=str(devices))
    found, wanted = numbers(run.run_dir), numbers(whole.run_dir)
    assert found.keys() == wanted.keys()
    losses = [key for key in found if key[1].endswith("loss") and key[0] > first]
    assert len(losses) > STEPS - first
    for key in losses:
        np.testing.assert_allclose(float(found[key]), float(wanted[key]), rtol=1e-5)
