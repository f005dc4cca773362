"""What a kind of fuzzing is, and what an error of ours is."""

import linecache
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import ClassVar

LONGEST_MESSAGE = 50_000  # characters


class Kind(ABC):
    """One thing that is read, spoilt in many ways.

    Attributes
    ----------
    name
        On the command line.
    errors
        Classes that are documented for bad input.
    names_file
        Whether a message must say which file is bad.
    """

    name: ClassVar[str]
    errors: ClassVar[tuple[type[BaseException], ...]] = (ValueError,)
    names_file: ClassVar[bool] = True

    @abstractmethod
    def prepare(self, scratch: Path) -> None:
        """Make what is sound, once, in a folder that stays."""

    @abstractmethod
    def build(self, steps: Sequence[Random], folder: Path) -> None:
        """Write a case into an empty folder: what is sound, and one change for each step."""

    @abstractmethod
    def check(self, folder: Path) -> None:
        """Read a case.

        Raises
        ------
        AssertionError
            If something was accepted that is not what the files say.
        """


class NotOursError(Exception):
    """A documented class whose message is not one of ours."""


def judge(kind: Kind, folder: Path) -> str:
    """Read a case; return "accepted" or "refused".

    Raises
    ------
    BaseException
        Whatever was raised and is no error of ours.
    """
    try:
        kind.check(folder)
    except kind.errors as error:
        if isinstance(error, AssertionError):
            raise
        _check_message(kind, error, folder)
        return "refused"
    return "accepted"


def _check_message(kind: Kind, error: BaseException, folder: Path) -> None:
    text = "\n".join([str(error), *getattr(error, "__notes__", [])])
    frame = traceback.extract_tb(error.__traceback__)[-1]
    # An error that NumPy or json raised has the class by chance, and tells nobody what to do.
    if not linecache.getline(frame.filename, frame.lineno or 0).lstrip().startswith("raise"):
        raise NotOursError(f"not raised by us: {type(error).__name__}: {text[:200]}") from error
    if not text.strip() or len(text) > LONGEST_MESSAGE:
        raise NotOursError(f"a message of {len(text)} characters: {text[:200]}") from error
    if kind.names_file and str(folder) not in text:
        raise NotOursError(f"the message names no file: {text[:200]}") from error
