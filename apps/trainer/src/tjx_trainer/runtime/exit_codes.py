"""Exit codes of the trainer, their meaning, and errors that carry one.

Standard library only: the supervisor imports this module.
"""

import signal
from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple


class ExitCode(IntEnum):
    """Exit codes of the trainer; 128 + n after a stop by signal n."""

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
    """Meaning of an exit code.

    Attributes
    ----------
    what : str
        What happened.
    answer : str
        What to do.
    again : bool
        Whether the supervisor restarts the trainer: a retry can succeed.
    """

    what: str
    answer: str
    again: bool


EXIT_INFO: Mapping[ExitCode, ExitInfo] = {
    ExitCode.FINISHED: ExitInfo("the last step was completed", "nothing to do", False),
    ExitCode.UNEXPECTED: ExitInfo(
        "an unexpected error; its traceback is on stderr",
        "run the same command to resume from the newest checkpoint; report the traceback",
        True,
    ),
    ExitCode.USER_ERROR: ExitInfo(
        "invalid flags, preset, data or run directory; nothing was changed",
        "follow the advice in each line of the message",
        False,
    ),
    ExitCode.NOT_FINITE: ExitInfo(
        "loss or gradients were not finite for many steps, also after one rollback",
        "lower the learning rate, in another run directory",
        False,
    ),
    ExitCode.CHECKPOINTS_DAMAGED: ExitInfo(
        "every checkpoint is corrupt",
        "restore one from a backup, or start again in another run directory",
        False,
    ),
    ExitCode.NOT_WRITTEN: ExitInfo(
        "a checkpoint or a record could not be written: the disk is full or unavailable, a limit "
        "or a permission forbids it, or an object store does not respond",
        "follow the message, then run the same command: it resumes from the newest checkpoint",
        True,
    ),
    ExitCode.HANG: ExitInfo(
        "the run hung; the stacks of all threads are on stderr and in hang-STEP.txt",
        "run the same command to resume from the newest checkpoint; the stacks show the cause",
        True,
    ),
    ExitCode.OUT_OF_MEMORY: ExitInfo(
        "a device or the host ran out of memory",
        "add one of the flags that the message lists",
        False,
    ),
    ExitCode.GAVE_UP: ExitInfo(
        "the supervisor gave up: three attempts in a row saved no checkpoint",
        "the message lists why each attempt ended",
        False,
    ),
    ExitCode.DATA_DAMAGED: ExitInfo(
        "training data became unreadable, truncated or damaged; the message names the file",
        "restore the file, or prepare the data again",
        True,
    ),
    ExitCode.KERNEL_FAILED: ExitInfo(
        "the attention kernel failed to compile or to run on the device",
        "set --model.attention_implementation as the message says",
        False,
    ),
    ExitCode.NOT_READ: ExitInfo(
        "a checkpoint could not be read after several attempts; it was not modified",
        "repair the disk or the connection, then run the same command: it resumes from the "
        "newest checkpoint",
        True,
    ),
    ExitCode.INTERRUPTED: ExitInfo(
        "stopped by SIGINT (Ctrl-C) after saving; a second Ctrl-C stops without saving",
        "run the same command to resume",
        False,
    ),
    ExitCode.TERMINATED: ExitInfo(
        "stopped by SIGTERM after saving",
        "run the same command to resume",
        False,
    ),
}  # fmt: skip


def table() -> str:
    """Return the table of exit codes as Markdown, for the documentation."""
    lines = ["| code | what happened | what helps | `--supervise` |", "|---|---|---|---|"]
    lines += [
        f"| {code:d} | {meaning.what} | {meaning.answer} | "
        f"{'restarts' if meaning.again else 'exits'} |"
        for code, meaning in EXIT_INFO.items()
    ]
    return "\n".join(lines) + "\n"


class KernelError(RuntimeError):
    """The attention kernel failed to compile or to run; the message names the flag to set."""


class ExactError(RuntimeError):
    """Sampler and trainer differ although the run requires equal bits."""


class NotFiniteError(RuntimeError):
    """Too many consecutive steps had a non-finite loss or gradients.

    Attributes
    ----------
    step : int
        The last of these steps; the first step of a run is 1.
    in_a_row : int
        Number of these steps.
    """

    def __init__(self, step: int, in_a_row: int) -> None:
        super().__init__(
            f"the loss or its gradients were not finite {in_a_row} steps in a row, up to step "
            f"{step}; each was skipped and changed nothing"
        )
        self.step, self.in_a_row = step, in_a_row
