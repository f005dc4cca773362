"""``--supervise``: starts the trainer again when it crashed, and says why each of its lives ended.

The supervisor imports no JAX: whatever takes the trainer down leaves it standing. A child of it
that loses its supervisor saves and ends; see `tjx_trainer.runtime.supervisor_client`.
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
from tjx_trainer.cli.command_line import parse_args
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime.exit_codes import EXIT_INFO, ExitCode
from tjx_trainer.runtime.run_dir import RunDirectory, make_new
from tjx_trainer.runtime.supervisor_client import MAX_REASON_BYTES, SUPERVISOR_VARIABLE

_PROGRAM = (sys.executable, "-m", "tjx_trainer.main")
LIVES_FILE = "lives.jsonl"
MAX_FAILED_ATTEMPTS = 3  # lives in a row without a newer checkpoint

# Seconds before the next life: 1, 3, 9 after 0, 1, 2 lives without progress.
_FIRST_DELAY, _DELAY_FACTOR = 1.0, 3
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Attempt(NamedTuple):
    """One run of the trainer, from its start to its end.

    Attributes
    ----------
    start, end : str
        When, in UTC.
    first_step, last_step : int
        Of the newest checkpoint before and after it; 0 where there is none.
    exit_code : int
        As a shell shows it: 128 + n where signal n killed it.
    why : str
        What its end means, and its last words.
    """

    start: str
    end: str
    first_step: int
    last_step: int
    exit_code: int
    why: str


def supervise(argv: Sequence[str], config: Config, *, program: Sequence[str] = _PROGRAM) -> int:
    """Run the trainer until it is finished, cannot go on, or was asked to stop.

    Parameters
    ----------
    argv : sequence of str
        The trainer's words, ``--supervise`` among them; nothing is wrong with them.
    config : Config
        What they say.
    program : sequence of str
        The command that is the trainer.

    Returns
    -------
    int
        The exit code of the trainer's last life, or `ExitCode.GAVE_UP`.
    """
    if config.run_dir is not None:
        return _supervise(argv, config, RunDirectory(Path(config.run_dir)), program)
    # The directory that the trainer would make: all lives go on in it.
    run = make_new(config.name, datetime.now().astimezone())
    try:
        return _supervise(argv, config, run, program)
    finally:
        with suppress(OSError):  # the trainer was refused and left it empty; or it did not
            run.path.rmdir()


def _supervise(
    argv: Sequence[str], config: Config, run: RunDirectory, program: Sequence[str]
) -> int:
    command = [*program, *parse_args(argv).argv(run_dir=str(run.path))]
    checkpoints = run.checkpoint_location(config)
    in_vain: list[Attempt] = []
    best = 0
    with Signals() as signals:
        while True:
            life = _live(command, checkpoints, signals)
            _record(run, life)
            if signals.asked_to_stop or not EXIT_INFO[_known(life.exit_code)].again:
                return life.exit_code
            in_vain = [] if life.last_step > max(best, life.first_step) else [*in_vain, life]
            best = max(best, life.first_step, life.last_step)
            _say(f"the trainer ended with exit code {life.exit_code}: {life.why}")
            if len(in_vain) == MAX_FAILED_ATTEMPTS:
                _say(_farewell(in_vain))
                return ExitCode.GAVE_UP
            delay = _FIRST_DELAY * _DELAY_FACTOR ** len(in_vain)
            _say(f"starting it again in {delay:g} s, from step {life.last_step}")
            if stopped_by := signals.sleep(delay):
                return 128 + stopped_by


class Signals:
    """Passes signals on to the child, and remembers one that asks to stop; a context manager.

    Attributes
    ----------
    asked_to_stop : int
        The first such signal; 0 where none came.
    """

    def __init__(self) -> None:
        self.asked_to_stop = 0
        self._told = False  # whether a child knows of it
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Signals":
        self._woken, self._wake = os.pipe()
        self._before = {number: signal.signal(number, self._pass_on) for number in _PASSED_ON}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._woken)
        os.close(self._wake)

    def sleep(self, seconds: float) -> int:
        """Wait, but not longer than until somebody asks to stop; return `asked_to_stop`."""
        select.select([self._woken], [], [], seconds)
        return self.asked_to_stop

    @contextmanager
    def to(self, child: subprocess.Popen[bytes]) -> Iterator[None]:
        """Pass on to this process; what came while it was started is passed on first."""
        self._child = child
        if self.asked_to_stop and not self._told:  # twice would be another message
            self._told = True
            child.send_signal(self.asked_to_stop)
        try:
            yield
        finally:
            self._child = None

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGUSR1 and not self.asked_to_stop:
            self.asked_to_stop = number
            os.write(self._wake, b"x")
        if self._child is not None:
            self._told = self._told or number == self.asked_to_stop
            self._child.send_signal(number)


def _live(command: Sequence[str], checkpoints: str | Path, signals: Signals) -> Attempt:
    """Start the trainer and wait for its end."""
    start, first_step = _now(), _newest(checkpoints)
    with ExitStack() as stack:
        # The child reads the end of one pipe of which the other end is ours alone, so that our
        # death closes it; into the other it writes its last words, or what has room.
        alive, ours = os.pipe()
        words, theirs = os.pipe()
        stack.callback(os.close, ours)
        stack.callback(os.close, words)
        os.set_blocking(words, False)
        os.set_blocking(theirs, False)
        try:
            child = subprocess.Popen(
                command,
                env=_environment(alive, theirs),
                pass_fds=(alive, theirs),
                stdin=subprocess.DEVNULL,
                # A terminal's Ctrl-C reaches a group: once, through us, is enough.
                process_group=0,
            )
        finally:
            os.close(alive)
            os.close(theirs)
        with signals.to(child):
            status = child.wait()
        said = _read(words)
    return Attempt(
        start=start,
        end=_now(),
        first_step=first_step,
        last_step=_newest(checkpoints),
        exit_code=status if status >= 0 else 128 - status,
        why=describe_exit(status) + (f"\n{said}" if said else ""),
    )


def _environment(alive: int, words: int) -> dict[str, str]:
    """Return ours, with what the child needs to know of us, and to find the modules that we use."""
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, SUPERVISOR_VARIABLE: f"{alive},{words}"}


def _read(words: int) -> str:
    try:
        return os.read(words, MAX_REASON_BYTES).decode("utf-8", "replace").strip()
    except BlockingIOError:  # none, and a child of the child keeps the pipe open
        return ""


def describe_exit(status: int) -> str:
    """Say what the end of a process means, by its status as `subprocess` gives it.

    Examples
    --------
    >>> describe_end(-11)
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
        return "an exit code that is not the trainer's own"
    return EXIT_INFO[ExitCode(status)].what


_SIGNAL_HINTS: Mapping[int, str] = {
    signal.SIGKILL: "by somebody, or by the system because the machine ran out of memory",
    signal.SIGSEGV: "native code crashed",
    signal.SIGABRT: "native code gave up",
    signal.SIGBUS: "a mapped file or its disk is gone, or native code crashed",
    signal.SIGILL: "the program is built for another processor",
}


def _known(status: int) -> ExitCode:
    """Return the exit code of the table; what is not in it is as an unexpected error."""
    return ExitCode(status) if status in ExitCode else ExitCode.UNEXPECTED


def _newest(checkpoints: str | Path) -> int:
    """Return the step of the newest checkpoint; 0 where there is none, or they cannot be seen."""
    try:
        return max(tjx_ckpt.list_steps(checkpoints), default=0)
    except Exception as error:  # each kind of remote storage has its own
        _say(f"{checkpoints} cannot be listed, which counts as no progress: {error}")
        return 0


def _record(run: RunDirectory, life: Attempt) -> None:
    """Add a life to the run's; a directory that was refused is left as it is."""
    if not run.config.exists():
        return
    with suppress(OSError), (run.path / LIVES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(life._asdict()) + "\n")


def _farewell(lives: list[Attempt]) -> str:
    reasons = [
        f"  {life.start}: exit code {life.exit_code}, {life.why.splitlines()[0]}" for life in lives
    ]
    head = f"giving up: {len(lives)} lives in a row made no newer checkpoint than that of step "
    return "\n".join([f"{head}{lives[-1].last_step}:", *reasons])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _say(text: str) -> None:
    with suppress(OSError):  # nobody may be left to read it
        sys.stderr.write(f"supervisor: {text}\n")
        sys.stderr.flush()
