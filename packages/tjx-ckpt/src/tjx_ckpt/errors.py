"""Errors of checkpoints, one class for each way in which a caller can react."""

import errno
from collections.abc import Mapping, Sequence

_NO_LOCKS = "the file system has no file locks: mount it with locks, or use another directory"
_ADVICE = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free disk space: the quota is used up",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "mount the file system for writing, or use another directory",
    errno.EACCES: "get permission for this path, or use another directory",
    errno.EPERM: "get permission for this path, or use another directory",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: stop other programs",
    errno.ENOMEM: "the machine is out of memory: stop other programs",
    errno.ENOLCK: _NO_LOCKS,
    errno.ENOSYS: _NO_LOCKS,
    errno.EOPNOTSUPP: _NO_LOCKS,
    errno.ELOOP: "remove this link or special file, which tjx did not create",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.EEXIST: "remove this link or file: a folder is required there",
    errno.ENOTDIR: "remove this file: a folder is required there",
    errno.EIO: "check the disk and the kernel's log (dmesg)",
    errno.ESTALE: "mount the network file system again",
    errno.ETIMEDOUT: "check the network file system",
}


def advice(error: BaseException) -> str:
    """Return advice for an error of the operating system; "" for errors without any."""
    return _ADVICE.get(getattr(error, "errno", None) or 0, "")


def _with_advice(text: str, error: BaseException) -> str:
    return f"{text}; {hint}" if (hint := advice(error)) else text


class CheckpointError(Exception):
    """Base class of all errors about stored checkpoints."""


class NoCheckpointError(CheckpointError):
    """The directory has no checkpoint, or none of the requested step."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint is damaged; raised with a line for each bad file.

    Attributes
    ----------
    step
        The damaged step.
    problems
        One line for each bad file: its name and the reason.
    """

    def __init__(self, step: int, problems: Sequence[str]) -> None:
        self.step = step
        self.problems = tuple(problems)
        super().__init__(f"checkpoint of step {step} is damaged:\n" + "\n".join(problems))


class AllCheckpointsCorruptError(CheckpointError):
    """All checkpoints are damaged; starting from scratch would lose the run.

    Parameters
    ----------
    message
        The message.

    Attributes
    ----------
    problems
        Lines for the bad files, by step.
    """

    def __init__(self, message: str, problems: Mapping[int, Sequence[str]]) -> None:
        self.problems = {step: tuple(lines) for step, lines in problems.items()}
        details = [f"step {step}: {line}" for step, lines in problems.items() for line in lines]
        super().__init__("\n".join([message, *details]))


class MismatchError(CheckpointError, ValueError):
    """The requested state has other keys, shapes or dtypes than the checkpoint."""


class SaveError(CheckpointError):
    """A background save failed.

    Parameters
    ----------
    cause
        The error of the save.

    Attributes
    ----------
    step
        The step that was not saved.
    """

    def __init__(self, step: int, cause: BaseException) -> None:
        self.step = step
        super().__init__(
            f"saving step {step} failed: {type(cause).__name__}: {cause}; "
            "earlier checkpoints are unchanged"
        )


class DirectoryInUseError(CheckpointError):
    """Another process is saving into the same directory."""


class StorageError(CheckpointError):
    """A file system or object store does not respond; its checkpoints can be intact."""


class UnreadableError(StorageError):
    """A checkpoint cannot be read now; its content can be intact, and nothing was changed.

    Parameters
    ----------
    place
        Path or URL that could not be read.
    cause
        Error of the last attempt.
    """

    def __init__(self, place: str, cause: BaseException) -> None:
        text = f"{place} cannot be read now: {type(cause).__name__}: {cause}"
        super().__init__(
            _with_advice(text, cause)
            + "; the checkpoint was not changed. If it is lost, rename its folder N to N.corrupt "
            "to resume from the previous one"
        )


class ClaimError(CheckpointError):
    """The directory of the checkpoints cannot be created, locked or written.

    Parameters
    ----------
    directory
        The directory.
    cause
        Error of the operating system.
    """

    def __init__(self, directory: str, cause: OSError) -> None:
        super().__init__(_with_advice(f"{directory}: cannot be claimed: {cause}", cause))


class CorruptCheckpointWarning(UserWarning):
    """A damaged checkpoint was skipped and an older one is used."""
