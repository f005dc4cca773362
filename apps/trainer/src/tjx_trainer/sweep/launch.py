"""Launching of several runs, one after another, each in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from tjx_trainer.runtime.exit_codes import ExitCode
from tjx_trainer.sweep.grid import SweepRun

_PROGRAM = (sys.executable, "-m", "tjx_trainer.main")

Launch = Callable[[Sequence[str]], int]


def run_all(
    folder: Path,
    runs: Sequence[SweepRun],
    launch: Launch,
    *,
    command: str,
    stop_at_failure: bool = False,
) -> tuple[int, dict[str, int]]:
    """Train each unfinished run.

    Parameters
    ----------
    folder : Path
        Folder of the run directories.
    runs : sequence of SweepRun
        The runs, in order.
    launch : callable
        From the arguments of one run to its exit code.
    command : str
        The subcommand, for messages.
    stop_at_failure : bool
        Whether a failed run ends the command; otherwise the others are trained.

    Returns
    -------
    tuple
        The exit code, and the exit codes of failed runs by name.
    """
    from tjx_trainer.sweep.results import is_finished

    failed: dict[str, int] = {}
    for number, each in enumerate(runs, 1):
        place = folder / each.name
        head = f"{command:<15}{number} of {len(runs)}: {each.name}"
        if is_finished(place):
            sys.stderr.write(f"{head}, already finished\n")
            continue
        sys.stderr.write(f"{head}\n")
        code = launch([*each.words, f"--run_dir={place}"])
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            sys.stderr.write(f"{command:<15}stopped; run the same command to continue\n")
            return code, failed
        if code:
            sys.stderr.write(f"{command:<15}{each.name} failed with exit code {code}\n")
            failed[each.name] = code
            if stop_at_failure:
                break
    return next(iter(failed.values()), ExitCode.FINISHED), failed


def launch_run(words: Sequence[str]) -> int:
    """Train a run in a new process, forwarding stop signals to it."""
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    with subprocess.Popen([*_PROGRAM, *words], env={**os.environ, "PYTHONPATH": path}) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            assert frame is None or frame
            # The terminal sends Ctrl-C to the run as well.
            if number != signal.SIGINT:
                process.send_signal(number)

        before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code
