"""What can go wrong with a checkpoint, one class for each answer that a caller may want to give."""

import errno
from collections.abc import Mapping, Sequence

_NO_LOCKS = "the file system keeps no locks: mount it with locks, or use another directory"
_ADVICE = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room: the quota is used up",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "mount the file system for writing, or use another directory",
    errno.EACCES: "get permission for this path, or use another directory",
    errno.EPERM: "get permission for this path, or use another directory",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: end some programs",
    errno.ENOMEM: "the machine has too little memory: end some programs",
    errno.ENOLCK: _NO_LOCKS,
    errno.ENOSYS: _NO_LOCKS,
    errno.EOPNOTSUPP: _NO_LOCKS,
    errno.ELOOP: "remove this link or special file: tjx did not make it",
    errno.EEXIST: "remove this link or file: a folder is needed there",
    errno.ENOTDIR: "remove this file: a folder is needed there",
    errno.EIO: "check the disk and the kernel's log (dmesg)",
    errno.ESTALE: "mount the network file system again",
    errno.ETIMEDOUT: "check the network file system",
}


def advice(error: BaseException) -> str:
    """Return what helps against an error of the operating system; "" where nothing is known."""
    return _ADVICE.get(getattr(error, "errno", None) or 0, "")


def _with_advice(text: str, error: BaseException) -> str:
    return f"{text}; {hint}" if (hint := advice(error)) else text


class CheckpointError(Exception):
    """Base of every error that this package raises about checkpoints on disk."""


class NoCheckpointError(CheckpointError):
    """The directory holds no checkpoint, or not the step that was asked for."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint is damaged.

    Attributes
    ----------
    step
        The damaged step.
    problems
        One line for each bad file: its name and what is wrong with it.
    """

    def __init__(self, step: int, problems: Sequence[str]) -> None:
        self.step = step
        self.problems = tuple(problems)
        super().__init__(f"checkpoint of step {step} is damaged:\n" + "\n".join(problems))


class AllCheckpointsCorruptError(CheckpointError):
    """There are checkpoints, and every one is damaged: starting anew would lose the run.

    Attributes
    ----------
    problems
        For each damaged step one line for each bad file.
    """

    def __init__(self, message: str, problems: Mapping[int, Sequence[str]]) -> None:
        self.problems = {step: tuple(lines) for step, lines in problems.items()}
        details = [f"step {step}: {line}" for step, lines in problems.items() for line in lines]
        super().__init__("\n".join([message, *details]))


class MismatchError(CheckpointError, ValueError):
    """The state that was asked for has other keys, shapes or dtypes than the checkpoint."""


class SaveError(CheckpointError):
    """A save that ran in the background failed.

    Attributes
    ----------
    step
        The step that was not saved.
    """

    def __init__(self, step: int, cause: BaseException) -> None:
        self.step = step
        super().__init__(
            f"saving step {step} failed: {type(cause).__name__}: {cause}; "
            "the checkpoints saved before it are untouched"
        )


class DirectoryInUseError(CheckpointError):
    """Another process is saving into the same directory."""


class StorageError(CheckpointError):
    """A file system or object store did not answer; this says nothing of the checkpoints in it."""


class UnreadableError(StorageError):
    """A checkpoint cannot be read now; this says nothing of its content, and it stays as it is.

    Parameters
    ----------
    place
        What could not be read.
    cause
        What the last attempt raised.
    """

    def __init__(self, place: str, cause: BaseException) -> None:
        text = f"{place} cannot be read now: {type(cause).__name__}: {cause}"
        super().__init__(
            _with_advice(text, cause)
            + "; the checkpoint was not touched. If its disk has lost it for good, rename its "
            "folder N to N.corrupt to continue from the one before"
        )


class ClaimError(CheckpointError):
    """The directory of the checkpoints cannot be made, locked or written.

    Parameters
    ----------
    directory
        Which.
    cause
        What the system said.
    """

    def __init__(self, directory: str, cause: OSError) -> None:
        super().__init__(_with_advice(f"{directory}: cannot be claimed: {cause}", cause))


class CorruptCheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over and an older one used."""
