"""Training with four processes: they stop at one step, and all end when one is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tjx_ckpt

HEARTBEAT = 5  # seconds of silence after which a process counts as dead
# In CI the same is seen of other runs by tests-integration/test_faults_processes.py.
pytestmark = pytest.mark.slow

PATIENCE = 120  # seconds for what takes a few, on a slow machine

TINY = """
--model.n_layer=1 --model.n_head=2 --model.d_model=16 --model.max_seq_len=16 --data.seq_len=16
--data.tokenizer=char --data.holdout=tail --train.batch_size=8 --train.eval_every=4
--train.eval_tokens=300 --train.sample_tokens=0 --log.every=1 --optimizer.learning_rate=1e-2
--schedule.name=constant --checkpoint.every=1000
""".split()  # noqa: SIM905  a list of words reads worse


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} sheep and {'more ' * (n % 5)}\n" for n in range(300)))
    return [*TINY, f"--data.path={text}", f"--data.cache_dir={folder / 'cache'}"]


@contextmanager
def together(
    words: list[str], run_dir: Path, count: int, more: list[list[str]] | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start processes that train together, told of each other by the environment alone.

    ``more`` are words of each process by itself.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
    }
    words = [*words, f"--distributed.heartbeat_timeout={HEARTBEAT}", f"--run_dir={run_dir}"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tjx_trainer.main", *words, *(more[index] if more else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **given, "JAX_PROCESS_ID": str(index)},
        )
        for index in range(count)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Wait for all; return the exit code and the words of each."""
    told = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


def losses(run_dir: Path) -> dict[tuple[str, int], float]:
    if not (run_dir / "metrics.jsonl").exists():
        return {}
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    records: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("\n")]
    found = [(name, r["step"], r[name]) for r in records for name in r if name.endswith("/loss")]
    assert len(found) == len({each[:2] for each in found}), "each stands once"
    return {(name, step): value for name, step, value in found}


def wait_for(run_dir: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while ("train/loss", step) not in losses(run_dir):
        assert time.monotonic() < deadline, "no step was made"
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.01)


@pytest.mark.parametrize("what", ["flags", "text"])
def test_unequal_processes_are_refused(words: list[str], tmp_path: Path, what: str) -> None:
    other = tmp_path / "other.txt"
    other.write_text("another text\n" * 300)
    difference = {
        "flags": "--optimizer.learning_rate=0.5",
        "text": f"--data.path={other}",
    }[what]
    more = [[], [difference, f"--data.cache_dir={tmp_path / 'cache'}"]]
    with together(words, tmp_path / "run", 2, more) as processes:
        found = ends(processes)
    assert [code for code, _ in found] == [2, 2], found
    assert {"flags": "optimizer.learning_rate", "text": "data: got"}[what] in found[0][1]
    assert not (tmp_path / "run").exists()


def test_a_stop_signal_to_one_process_stops_all_at_one_step_and_fewer_resume(
    words: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with together([*words, "--train.max_steps=500"], run_dir, 4) as processes:
        wait_for(run_dir, 3, processes)
        processes[2].send_signal(signal.SIGTERM)
        found = ends(processes)
    assert [code for code, _ in found] == [143] * 4, found
    (stopped,) = tjx_ckpt.list_steps(run_dir / "checkpoints")
    assert f"stopped by SIGTERM after saving step {stopped};" in found[0][1]
    # Process 0 speaks for all. What the others print is Gloo's.
    others = [line for _, text in found[1:] for line in text.splitlines()]
    assert [line for line in others if "connected" not in line] == []
    assert 3 <= stopped < 500

    # One process resumes with the same batches.
    last = [*words, f"--train.max_steps={stopped + 3}"]
    with together(last, run_dir, 1) as processes:
        ((code, told),) = ends(processes)
    assert code == 0, told
    assert f"resuming       from step {stopped}" in told
    assert "results may differ in bits" in told
    with together(last, tmp_path / "alone", 1) as processes:
        assert ends(processes)[0][0] == 0
    mixed, alone = losses(run_dir), losses(tmp_path / "alone")
    common = mixed.keys() & alone.keys()
    assert {("train/loss", stopped + 3), ("eval/loss", stopped + 3), ("train/loss", 1)} <= common
    for each in common:
        assert mixed[each] == pytest.approx(alone[each], abs=1e-5), each


@pytest.mark.parametrize(
    ("number", "whom"),
    [
        (signal.SIGKILL, 3),
        (signal.SIGKILL, 0),
        (signal.SIGSTOP, 2),
        (signal.SIGSTOP, 0),
    ],
)
def test_all_processes_end_when_one_is_lost(
    words: list[str], tmp_path: Path, number: signal.Signals, whom: int
) -> None:
    run_dir = tmp_path / "run"
    with together([*words, "--train.max_steps=5000"], run_dir, 4) as processes:
        wait_for(run_dir, 2, processes)
        processes[whom].send_signal(number)
        begin = time.monotonic()
        others = [process for index, process in enumerate(processes) if index != whom]
        found = ends(others)
        seconds = time.monotonic() - begin
    for code, told in found:
        assert code != 0
        last = told.splitlines()[-1]
        assert "To resume from the newest" in last
        assert f"--run_dir {run_dir}" in last
    # Two heartbeats, and what a busy machine takes to end a process.
    assert seconds < 2 * HEARTBEAT + 20
