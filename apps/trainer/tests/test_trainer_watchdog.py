"""Watchdog: a hung run ends with its stacks; slow, compiling or suspended runs do not."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tjx_trainer.config.watchdog_config import WatchdogConfig
from tjx_trainer.runtime.exit_codes import ExitCode

DEADLINE = 120.0  # seconds after which a test that waits has failed

# What a trainer does, as far as the watchdog knows it; `wait_here` waits in C, on a pipe.
PROGRAM = """
import os, pathlib, sys, time
from tjx_trainer.runtime.watchdog import Watchdog
from tjx_trainer.config.watchdog_config import WatchdogConfig

run_path = pathlib.Path(sys.argv[1])
empty, _ = os.pipe()

def wait_here():
    os.read(empty, 1)

def steps(watchdog, first, count, seconds=0.01, phase="train"):
    for step in range(first, first + count):
        watchdog.beat(phase, step)
        time.sleep(seconds)

def config(**values):
    return WatchdogConfig(**{"factor": 4.0, "min_seconds": 0.5, **values})
"""


def start_program(program: str, folder: Path) -> subprocess.Popen[str]:
    """Start a program that begins as `PROGRAM`, with `folder` as the run directory."""
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + program, str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a program in the folder of the test; kill what is left of it at the end."""
    started: list[subprocess.Popen[str]] = []

    def begin(program: str) -> subprocess.Popen[str]:
        started.append(start_program(program, tmp_path))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


SLOW = """
with Watchdog(run_path, config()) as watchdog:
    watchdog.beat("train", 0)
    time.sleep(1.0)  # compiles
    steps(watchdog, 1, 10)
    watchdog.beat("evaluate", 10)
    time.sleep(1.0)  # so does this
    steps(watchdog, 10, 5, 0.4, phase="slow")
    steps(watchdog, 15, 1, 1.2, phase="slow")  # three times the median, and the limit is four
    # Work that is only started takes no time; what waits for it takes as long as it always did.
    for step in range(8):
        steps(watchdog, step, 3, 0.0, phase="started")
        steps(watchdog, step, 1, 0.2 if step < 7 else 0.7, phase="started")
"""


@pytest.fixture(scope="module", autouse=True)
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start `SLOW`, which sleeps for seconds, beside the other tests."""
    folder = tmp_path_factory.mktemp("slow")
    process = start_program(SLOW, folder)
    yield process, folder
    process.kill()
    process.communicate()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=DEADLINE)
    return process.returncode, errors


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)


@contextmanager
def stopped(process: subprocess.Popen[str]) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    status = Path(f"/proc/{process.pid}/stat")
    wait_until(lambda: status.read_text().rpartition(")")[2].split()[0] == "T")
    yield
    process.send_signal(signal.SIGCONT)


def test_a_hang_ends_the_run_and_names_the_place(
    start: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    code, errors = end_of(
        start(
            """
import threading
threading.Thread(target=wait_here, name="another", daemon=True).start()
with Watchdog(run_path, config(heartbeat_seconds=0.05)) as watchdog:
    steps(watchdog, 0, 20)
    watchdog.beat("train", 20)
    wait_here()
"""
        )
    )
    assert code == ExitCode.HANG
    kept = (tmp_path / "hang-20.txt").read_text()
    for report in (errors, kept):
        assert "'train'" in report
        assert "after step 20" in report
        assert report.count("wait_here") == 2  # both threads, not the main one alone
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["phase"], beat["step"]) == ("train", 20)


def test_time_in_which_the_process_was_stopped_does_not_count(
    start: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(
        """
with Watchdog(run_path, config(heartbeat_seconds=0.05)) as watchdog:
    steps(watchdog, 0, 10)
    while not (run_path / "go on").exists():
        watchdog.beat("wait", 10)
        time.sleep(0.02)
    watchdog.beat("train", 11)
    wait_here()
"""
    )
    wait_until(lambda: (tmp_path / "heartbeat.json").exists())
    with stopped(process):
        time.sleep(1.5)  # three times the limit, which must pass
    with stopped(process):
        time.sleep(0.7)
    assert process.poll() is None
    assert not list(tmp_path.glob("hang*"))
    (tmp_path / "go on").touch()
    assert end_of(process)[0] == ExitCode.HANG  # it still looks


def test_switched_off_it_only_keeps_the_heartbeat(
    start: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    code, _ = end_of(
        start(
            """
with Watchdog(run_path, config(enabled=False, heartbeat_seconds=0.05), process=2) as watchdog:
    steps(watchdog, 0, 10)
    time.sleep(1.5)
    steps(watchdog, 10, 3)
"""
        )
    )
    assert code == 0
    assert json.loads((tmp_path / "heartbeat-process-2.json").read_text())["step"] == 12
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat-process-2.json"]


def test_a_heartbeat_is_complete_names_the_process_and_ages_without_progress(
    start: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(
        """
with Watchdog(run_path, config(enabled=False, heartbeat_seconds=0.01)) as watchdog:
    steps(watchdog, 0, 300, 0.002)
    print("pause", flush=True)
    sys.stdout.flush()
    wait_here()
"""
    )
    path = tmp_path / "heartbeat.json"
    wait_until(path.exists)
    seen: set[int] = set()
    while len(seen) < 10:  # each time a whole file
        beat = json.loads(path.read_text())
        seen.add(beat["step"])
        if beat["step"] == 299:
            break
    assert len(seen) > 1
    assert beat["pid"] == process.pid
    wait_until(lambda: json.loads(path.read_text())["step"] == 299)
    written = path.stat().st_mtime_ns
    time.sleep(0.3)  # thirty heartbeats
    assert path.stat().st_mtime_ns == written


def test_a_full_or_missing_disk_does_not_silence_the_watchdog(
    start: Callable[[str], subprocess.Popen[str]],
) -> None:
    code, errors = end_of(
        start(
            """
with Watchdog(run_path / "gone", config(heartbeat_seconds=0.05)) as watchdog:
    steps(watchdog, 0, 10)
    watchdog.beat("train", 10)
    wait_here()
"""
        )
    )
    assert code == ExitCode.HANG
    assert "wait_here" in errors


def test_slow_phases_are_not_hangs(slow: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = slow
    assert end_of(process) == (0, "")
    assert not list(folder.glob("hang*"))


def test_all_invalid_numbers_are_reported_at_once() -> None:
    with pytest.raises(ValueError, match=r"factor: got 1\.0") as caught:
        WatchdogConfig(factor=1.0, min_seconds=0.0, heartbeat_seconds=float("nan"))
    assert len(str(caught.value).splitlines()) == 3
