"""``--supervise``: restart the trainer after a crash and record why each attempt ended.

The supervisor imports no JAX, so it survives whatever crashes the trainer. A trainer whose
supervisor dies saves and stops; see `supervisor_client`.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import tjx_ckpt
from tjx_trainer.cli.arguments import parse_args
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime.exit_codes import EXIT_INFO, ExitCode
from tjx_trainer.runtime.run_dir import RunDirectory, make_new
from tjx_trainer.runtime.supervisor_client import MAX_REASON_BYTES, SUPERVISOR_VARIABLE

_PROGRAM = (sys.executable, "-m", "tjx_trainer.main")
ATTEMPTS_FILE = "lives.jsonl"
MAX_FAILED_ATTEMPTS = 3  # consecutive attempts without a newer checkpoint

# Exponential backoff [s]: 1, 3, 9 after 0, 1, 2 attempts without progress.
_FIRST_DELAY, _DELAY_FACTOR = 1.0, 3
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Attempt(NamedTuple):
    """One execution of the trainer.

    Attributes
    ----------
    start, end : str
        Times in UTC.
    first_step, last_step : int
        Step of the newest checkpoint before and after it; 0 without one.
    exit_code : int
        As a shell reports it: 128 + n after signal n.
    why : str
        Meaning of the exit code, and the reason that the trainer sent.
    """

    start: str
    end: str
    first_step: int
    last_step: int
    exit_code: int
    why: str


def supervise(argv: Sequence[str], config: Config, *, program: Sequence[str] = _PROGRAM) -> int:
    """Run the trainer until it finishes, cannot continue, or is stopped.

    Parameters
    ----------
    argv : sequence of str
        The valid arguments of the trainer, with ``--supervise``.
    config : Config
        The configuration they give.
    program : sequence of str
        The command that starts the trainer.

    Returns
    -------
    int
        The exit code of the last attempt, or `ExitCode.GAVE_UP`.
    """
    if config.run_dir is not None:
        return _supervise(argv, config, RunDirectory(Path(config.run_dir)), program)
    # Create the run directory here, so that all attempts use the same one.
    run = make_new(config.name, datetime.now().astimezone())
    try:
        return _supervise(argv, config, run, program)
    finally:
        with suppress(OSError):  # removes the directory only if the trainer left it empty
            run.path.rmdir()


def _supervise(
    argv: Sequence[str], config: Config, run: RunDirectory, program: Sequence[str]
) -> int:
    command = [*program, *parse_args(argv).argv(run_dir=str(run.path))]
    checkpoints = run.checkpoint_location(config)
    failed: list[Attempt] = []
    best = 0
    with SignalForwarder() as signals:
        while True:
            attempt = _attempt(command, checkpoints, signals)
            _record(run, attempt)
            if signals.forwarded or not EXIT_INFO[_known(attempt.exit_code)].again:
                return attempt.exit_code
            failed = [] if attempt.last_step > max(best, attempt.first_step) else [*failed, attempt]
            best = max(best, attempt.first_step, attempt.last_step)
            _log(f"the trainer ended with exit code {attempt.exit_code}: {attempt.why}")
            if len(failed) == MAX_FAILED_ATTEMPTS:
                _log(_give_up_message(failed))
                return ExitCode.GAVE_UP
            delay = _FIRST_DELAY * _DELAY_FACTOR ** len(failed)
            _log(f"restarting in {delay:g} s from step {attempt.last_step}")
            if stopped_by := signals.sleep(delay):
                return 128 + stopped_by


class SignalForwarder:
    """Forward signals to the child process and record a stop signal; a context manager.

    Attributes
    ----------
    stop : int
        The first stop signal; 0 without one.
    forwarded : bool
        Whether a child received it.
    """

    def __init__(self) -> None:
        self.stop = 0
        self.forwarded = False
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "SignalForwarder":
        self._woken, self._wake = os.pipe()
        self._before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._woken)
        os.close(self._wake)

    def sleep(self, seconds: float) -> int:
        """Sleep until a stop signal or for `seconds`; return `stop`."""
        select.select([self._woken], [], [], seconds)
        return self.stop

    @contextmanager
    def to(self, child: subprocess.Popen[bytes]) -> Iterator[None]:
        """Forward signals to this process, first a signal that arrived while it was starting."""
        self._child = child
        if self.stop and not self.forwarded:  # a second SIGINT means something else
            self.forwarded = True
            child.send_signal(self.stop)
        try:
            yield
        finally:
            self._child = None

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGUSR1 and not self.stop:
            self.stop = number
            os.write(self._wake, b"x")
        if self._child is not None:
            self.forwarded = self.forwarded or number == self.stop
            self._child.send_signal(number)


def _attempt(command: Sequence[str], checkpoints: str | Path, signals: SignalForwarder) -> Attempt:
    """Start the trainer and wait for its end."""
    start, first_step = _now(), _newest(checkpoints)
    with ExitStack() as stack:
        # The child reads a pipe whose write end only the supervisor holds, so the supervisor's
        # death closes it. It writes its exit reason to a second pipe.
        alive, held = os.pipe()
        reason, theirs = os.pipe()
        stack.callback(os.close, held)
        stack.callback(os.close, reason)
        os.set_blocking(reason, False)
        os.set_blocking(theirs, False)
        try:
            child = subprocess.Popen(
                command,
                env=_environment(alive, theirs),
                pass_fds=(alive, theirs),
                stdin=subprocess.DEVNULL,
                # Ctrl-C reaches the whole process group: forward it only once.
                process_group=0,
            )
        finally:
            os.close(alive)
            os.close(theirs)
        with signals.to(child):
            status = child.wait()
        text = _read(reason)
    return Attempt(
        start=start,
        end=_now(),
        first_step=first_step,
        last_step=_newest(checkpoints),
        exit_code=status if status >= 0 else 128 - status,
        why=describe_exit(status) + (f"\n{text}" if text else ""),
    )


def _environment(alive: int, reason: int) -> dict[str, str]:
    """Return the environment of the child: the descriptors and the module search path."""
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, SUPERVISOR_VARIABLE: f"{alive},{reason}"}


def _read(reason: int) -> str:
    try:
        return os.read(reason, MAX_REASON_BYTES).decode("utf-8", "replace").strip()
    except BlockingIOError:  # no reason, and a grandchild keeps the pipe open
        return ""


def describe_exit(status: int) -> str:
    """Describe how a process ended, by its status as `subprocess` returns it.

    Examples
    --------
    >>> describe_exit(-11)
    'killed by SIGSEGV: native code crashed'
    """
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:  # a real-time signal has none
            name = f"signal {-status}"
        hint = _SIGNAL_HINTS.get(-status)
        return f"killed by {name}{f': {hint}' if hint else ''}"
    if status not in ExitCode:
        return "unknown exit code"
    return EXIT_INFO[ExitCode(status)].what


_SIGNAL_HINTS: Mapping[int, str] = {
    signal.SIGKILL: "by a user, or by the system because the machine ran out of memory",
    signal.SIGSEGV: "native code crashed",
    signal.SIGABRT: "native code aborted",
    signal.SIGBUS: "a memory-mapped file or its disk is gone, or native code crashed",
    signal.SIGILL: "the program was built for another processor",
}


def _known(status: int) -> ExitCode:
    """Return the exit code; unknown codes count as unexpected errors."""
    return ExitCode(status) if status in ExitCode else ExitCode.UNEXPECTED


def _newest(checkpoints: str | Path) -> int:
    """Return the step of the newest checkpoint; 0 without one or if listing fails."""
    try:
        return max(tjx_ckpt.list_steps(checkpoints), default=0)
    except Exception as error:  # each remote storage backend raises its own
        _log(f"cannot list {checkpoints}, assuming no progress: {error}")
        return 0


def _record(run: RunDirectory, attempt: Attempt) -> None:
    """Append an attempt to lives.jsonl, if the directory holds a run."""
    if not run.config.exists():
        return
    with suppress(OSError), (run.path / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(attempt._asdict()) + "\n")


def _give_up_message(attempts: list[Attempt]) -> str:
    reasons = [
        f"  {each.start}: exit code {each.exit_code}, {each.why.splitlines()[0]}"
        for each in attempts
    ]
    head = f"giving up: {len(attempts)} attempts in a row saved no checkpoint after step "
    return "\n".join([f"{head}{attempts[-1].last_step}:", *reasons])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _log(text: str) -> None:
    with suppress(OSError):  # stderr may be closed
        sys.stderr.write(f"supervisor: {text}\n")
        sys.stderr.flush()
