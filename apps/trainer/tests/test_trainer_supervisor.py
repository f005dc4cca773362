"""Supervisor: restarts after crashes, stops on signals, and records the exit reasons."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tjx_trainer.runtime.exit_codes import EXIT_INFO, ExitCode
from tjx_trainer.runtime.supervisor import SignalForwarder, describe_exit
from tjx_trainer.runtime.supervisor_client import SUPERVISOR_VARIABLE

DEADLINE = 120.0  # seconds after which a test that waits has failed
RUN_DIR = ("--run_dir", "run")

# The supervisor as `main` starts it, with another program as its trainer, and delays of our own.
PARENT = """
import os, sys
from tjx_trainer.runtime import supervisor
from tjx_trainer.cli.arguments import parse_args, resolve
script, *words = sys.argv[1:]
assert parse_args(words).supervise
supervisor._FIRST_DELAY = float(os.environ["FIRST_DELAY"])
code = supervisor.supervise(words, resolve(words), program=(sys.executable, "-c", script))
assert "jax" not in sys.modules
sys.exit(code)
"""

# A trainer whose behaviour depends on the attempt number: `life(n)` of the script.
CHILD = """
import os, pathlib, signal, sys, time
from tjx_trainer.runtime.supervisor_client import connect, send_exit_reason

signal.alarm(600)  # whatever a test that fails leaves behind
connect()
words = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
run = pathlib.Path(words["run_dir"])
checkpoints = pathlib.Path(words.get("checkpoint.directory", run / "checkpoints"))
checkpoints.mkdir(parents=True, exist_ok=True)
(run / "config.yaml").touch()
lives = run / "lives"
number = lives.stat().st_size if lives.exists() else 0
with lives.open("a") as file:
    file.write("x")

def save(step):
    folder = checkpoints / str(step)
    folder.mkdir()
    (folder / "manifest.json").touch()

def crash():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def supervise(
    tmp_path: Path,
) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start a supervisor with a scripted trainer; kill what is left of it."""
    started: list[subprocess.Popen[str]] = []
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)

    def begin(
        script: str, words: Sequence[str] = RUN_DIR, first_delay: float = 0.0
    ) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", PARENT, CHILD + script, "--supervise", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "FIRST_DELAY": str(first_delay)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()  # not read: a trainer that was left alive keeps it open


def end_of(process: "subprocess.Popen[str]") -> tuple[int, str]:
    _, errors = process.communicate(timeout=DEADLINE)
    return process.returncode, errors


def wait_for(path: Path) -> None:
    limit = time.monotonic() + DEADLINE
    while not path.exists():
        assert time.monotonic() < limit, f"{path} did not come"
        time.sleep(0.01)


def recorded(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "lives.jsonl").read_text().splitlines()]


def test_crashes_are_survived_while_each_attempt_makes_progress(
    supervise: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    code, errors = end_of(
        supervise(
            """
save(number * 10 + 10)
if number == 4:
    assert words["train.max_steps"] == "77" and words["config"] == "quickstart", words
    sys.exit(0)
if number == 1:
    send_exit_reason("Traceback of something\\nSomeError: it broke")
    sys.exit(1)
crash()
""",
            [*RUN_DIR, "--train.max_steps", "77"],
        )
    )
    assert code == 0, errors
    lives = recorded(tmp_path / "run")
    assert [life["last_step"] for life in lives] == [10, 20, 30, 40, 50]
    assert [life["exit_code"] for life in lives] == [137, 1, 137, 137, 0]
    assert "SIGKILL" in str(lives[0]["why"])
    assert "SomeError: it broke" in str(lives[1]["why"])
    assert "SomeError: it broke" in errors
    assert lives[0]["start"] <= lives[0]["end"] <= lives[1]["start"]  # type: ignore[operator]  # text


def test_it_gives_up_after_three_failed_attempts_with_their_reasons(
    supervise: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    code, errors = end_of(
        supervise(
            """
if number == 0:
    save(30)
if number == 1:
    # It goes back, saves and dies where it died before: that is no progress.
    (checkpoints / "30" / "manifest.json").unlink()
    (checkpoints / "30").rmdir()
    save(20)
if number == 2:
    save(30)
    os.kill(os.getpid(), signal.SIGSEGV)
sys.exit([1, 5, None, 6][number])
"""
        )
    )
    assert code == ExitCode.GAVE_UP
    farewell = errors[errors.index("giving up") :]
    for reason in (EXIT_INFO[ExitCode.NOT_WRITTEN].what, "SIGSEGV", EXIT_INFO[ExitCode.HANG].what):
        assert reason in farewell
    assert EXIT_INFO[ExitCode.UNEXPECTED].what not in farewell  # that attempt saved a checkpoint
    lives = recorded(tmp_path / "run")
    assert [life["exit_code"] for life in lives] == [1, 5, 139, 6]
    assert "Fatal Python error: Segmentation fault" in str(lives[2]["why"])


@pytest.mark.parametrize(
    "code",
    [
        ExitCode.USER_ERROR,
        ExitCode.OUT_OF_MEMORY,
        ExitCode.TERMINATED,
    ],
)
def test_permanent_failures_are_not_retried(
    supervise: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, code: ExitCode
) -> None:
    assert end_of(supervise(f"sys.exit({code:d})"))[0] == code
    assert len(recorded(tmp_path / "run")) == 1


def test_all_attempts_use_one_new_directory(
    supervise: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    script = "save(number + 1)\nif number == 0:\n    crash()\n"
    assert end_of(supervise(script, ["--checkpoint.directory=elsewhere"]))[0] == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("quickstart-")
    assert [life["last_step"] for life in recorded(run)] == [1, 2]


STOPS_ON_SIGNAL = """
asked = []
def note(number, frame):
    asked.append(number)
    (run / f"signal {number} came {len(asked)}").touch()
for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(each, note)
(run / "pid").write_text(str(os.getpid()))
(run / "ready").touch()
while not set(asked) & {signal.SIGTERM, signal.SIGINT}:
    signal.pause() if not asked else time.sleep(0.01)
save(7)
(run / "ended").touch()
sys.exit(128 + next(each for each in asked if each != signal.SIGUSR1))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_signals_reach_the_trainer_once_and_end_the_supervision(
    supervise: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = supervise(STOPS_ON_SIGNAL)
    wait_for(run / "ready")
    # A terminal's Ctrl-C reaches a whole group: it must not come a second time on its own.
    assert os.getpgid(int((run / "pid").read_text())) != os.getpgid(process.pid)
    process.send_signal(signal.SIGUSR1)
    wait_for(run / f"signal {signal.SIGUSR1:d} came 1")
    process.send_signal(number)
    code, _ = end_of(process)
    assert code == 128 + number
    assert len(list(run.glob("signal*"))) == 2
    assert [life["last_step"] for life in recorded(run)] == [7]


def test_a_trainer_that_crashes_while_it_stops_is_not_started_again(
    supervise: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = supervise('signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); '
                        '(run / "ready").touch(); signal.pause()')  # fmt: skip
    wait_for(tmp_path / "run" / "ready")
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 1
    assert len(recorded(tmp_path / "run")) == 1


def test_a_signal_that_comes_while_the_trainer_is_started_reaches_it() -> None:
    with SignalForwarder() as signals, subprocess.Popen(["sleep", "1000"]) as child:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.stop == signal.SIGTERM
            with signals.to(child):
                assert child.wait(DEADLINE) == -signal.SIGTERM
        finally:
            child.kill()


def test_a_trainer_stops_when_its_supervisor_is_killed(
    supervise: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = supervise(STOPS_ON_SIGNAL)
    wait_for(run / "ready")
    process.kill()
    wait_for(run / "ended")  # stopped by the signal after saving
    assert (run / f"signal {signal.SIGTERM:d} came 1").exists()


def test_a_stop_signal_between_two_attempts_stops(
    supervise: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = supervise("sys.exit(1)", first_delay=1e6)
    wait_for(tmp_path / "run" / "lives.jsonl")
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 128 + signal.SIGTERM


def test_a_wrong_flag_is_reported_once_by_the_supervisor(tmp_path: Path) -> None:
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    wrong = ["--supervise", "--model.n_layers", "3", "--watchdog.factor", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "tjx_trainer.main", *wrong],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False, timeout=DEADLINE, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == ExitCode.USER_ERROR
    assert done.stderr.count("model.n_layer?") == 1
    assert done.stderr.count("watchdog.factor: got") == 1
    assert done.stderr.startswith("2 mistakes")
    assert not list(tmp_path.iterdir())


def test_sending_the_exit_reason_never_blocks(
    supervise: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    code, _ = end_of(
        supervise('[send_exit_reason("x" * 100_000) for _ in range(100)]; sys.exit(3)')
    )
    assert code == ExitCode.NOT_FINITE
    assert SUPERVISOR_VARIABLE not in os.environ


def test_every_exit_status_has_a_description() -> None:
    assert "SIGBUS" in describe_exit(-signal.SIGBUS)
    assert "signal 40" in describe_exit(-40)
    assert describe_exit(77) == "unknown exit code"
