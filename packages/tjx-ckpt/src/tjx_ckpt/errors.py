"""What can go wrong with a checkpoint, one class for each answer that a caller may want to give."""

from collections.abc import Mapping, Sequence


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
    """An object store did not answer, or refused to; this says nothing of the checkpoints in it."""


class CorruptCheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over and an older one used."""
