"""How the program ends: its exit codes, each with what it means, and the errors that need no JAX.

Standard library only, as the supervisor reads it too.
"""

import signal
from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple


class ExitCode(IntEnum):
    """Exit codes of the trainer; 128 + n is that of a run that was asked to stop by signal n."""

    FINISHED = 0
    UNEXPECTED = 1
    USER_ERROR = 2
    NOT_FINITE = 3
    CHECKPOINTS_DAMAGED = 4
    NOT_WRITTEN = 5
    HANG = 6
    OUT_OF_MEMORY = 7
    GAVE_UP = 8
    DATA_DAMAGED = 9
    KERNEL_FAILED = 10
    NOT_READ = 11
    INTERRUPTED = 128 + signal.SIGINT
    TERMINATED = 128 + signal.SIGTERM


class ExitInfo(NamedTuple):
    """What an exit code says.

    Attributes
    ----------
    what : str
        What happened.
    answer : str
        What helps.
    again : bool
        Whether a supervisor starts the trainer again: it may go otherwise the next time.
    """

    what: str
    answer: str
    again: bool


EXIT_INFO: Mapping[ExitCode, ExitInfo] = {
    ExitCode.FINISHED: ExitInfo("the last step was made", "nothing is left to do", False),
    ExitCode.UNEXPECTED: ExitInfo(
        "an error that nobody foresaw; its traceback is on stderr",
        "the same command goes on from the newest checkpoint; report the traceback",
        True,
    ),
    ExitCode.USER_ERROR: ExitInfo(
        "flags, preset, data or run directory are not what the run needs; nothing was changed",
        "do what each line of the message says",
        False,
    ),
    ExitCode.NOT_FINITE: ExitInfo(
        "loss or gradients were not finite step after step, also after going back once",
        "lower the learning rate, in another run directory",
        False,
    ),
    ExitCode.CHECKPOINTS_DAMAGED: ExitInfo(
        "there are checkpoints and every one is damaged",
        "bring one back from a copy, or start again in another run directory",
        False,
    ),
    ExitCode.NOT_WRITTEN: ExitInfo(
        "a checkpoint or a record could not be written: the disk is full or was taken away, a "
        "limit or a permission forbids it, or an object store does not answer",
        "do what the message says, then run the same command: it resumes from the newest "
        "checkpoint",
        True,
    ),
    ExitCode.HANG: ExitInfo(
        "the run made no progress; what each thread was doing is on stderr and in hang-STEP.txt",
        "the same command goes on from the newest checkpoint; the stacks name the place",
        True,
    ),
    ExitCode.OUT_OF_MEMORY: ExitInfo(
        "a device or the host had too little memory",
        "give one of the flags that the message lists",
        False,
    ),
    ExitCode.GAVE_UP: ExitInfo(
        "the supervisor gave up: three lives in a row made no checkpoint",
        "the message says why each of them ended",
        False,
    ),
    ExitCode.DATA_DAMAGED: ExitInfo(
        "training data became unreadable, truncated or damaged; the message names the file",
        "bring the file back, or prepare the data again",
        True,
    ),
    ExitCode.KERNEL_FAILED: ExitInfo(
        "the attention kernel failed to compile or to run on the device",
        "give --model.attention_implementation as the message says",
        False,
    ),
    ExitCode.NOT_READ: ExitInfo(
        "a checkpoint cannot be read now, after several attempts; it was not touched",
        "repair the disk or the connection, then run the same command: it resumes from the "
        "newest checkpoint",
        True,
    ),
    ExitCode.INTERRUPTED: ExitInfo(
        "asked to stop by SIGINT (Ctrl-C); saved, unless it was pressed twice",
        "the same command goes on",
        False,
    ),
    ExitCode.TERMINATED: ExitInfo(
        "asked to stop by SIGTERM; saved",
        "the same command goes on",
        False,
    ),
}  # fmt: skip


def table() -> str:
    """Return the table of exit codes as Markdown, as the documentation shows it."""
    lines = ["| code | what happened | what helps | `--supervise` |", "|---|---|---|---|"]
    lines += [
        f"| {code:d} | {meaning.what} | {meaning.answer} | "
        f"{'starts again' if meaning.again else 'ends with it'} |"
        for code, meaning in EXIT_INFO.items()
    ]
    return "\n".join(lines) + "\n"


class KernelError(RuntimeError):
    """The attention kernel failed to compile or to run; the message names the flag to give."""


class NotFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradients that were not finite.

    Attributes
    ----------
    step : int
        The last of these steps; 1 is the first of a run.
    in_a_row : int
        How many there were.
    """

    def __init__(self, step: int, in_a_row: int) -> None:
        super().__init__(
            f"the loss or its gradients were not finite {in_a_row} steps in a row, up to step "
            f"{step}; each was skipped and changed nothing"
        )
        self.step, self.in_a_row = step, in_a_row
