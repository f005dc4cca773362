"""Interface of fuzz kinds, and the criterion for documented errors."""

import linecache
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import ClassVar

LONGEST_MESSAGE = 50_000  # characters


class Kind(ABC):
    """Base class of fuzz kinds: one type of input.

    Attributes
    ----------
    name
        Name on the command line.
    errors
        Documented exception classes for invalid input.
    names_file
        Whether messages must name the file.
    """

    name: ClassVar[str]
    errors: ClassVar[tuple[type[BaseException], ...]] = (ValueError,)
    names_file: ClassVar[bool] = True

    @abstractmethod
    def prepare(self, scratch: Path) -> None:
        """Create valid input once, in a permanent folder."""

    @abstractmethod
    def build(self, steps: Sequence[Random], folder: Path) -> None:
        """Write a case into an empty folder: valid input with one mutation per step."""

    @abstractmethod
    def check(self, folder: Path) -> None:
        """Read a case.

        Raises
        ------
        AssertionError
            If an accepted result differs from the files.
        """


class NotOursError(Exception):
    """An exception of a documented class that does not come from tjx code."""


def judge(kind: Kind, folder: Path) -> str:
    """Read a case; return "accepted" or "rejected".

    Raises
    ------
    BaseException
        Any exception that is not documented.
    """
    try:
        kind.check(folder)
    except kind.errors as error:
        if isinstance(error, AssertionError):
            raise
        _check_message(kind, error, folder)
        return "rejected"
    return "accepted"


def _check_message(kind: Kind, error: BaseException, folder: Path) -> None:
    text = "\n".join([str(error), *getattr(error, "__notes__", [])])
    frame = traceback.extract_tb(error.__traceback__)[-1]
    # Errors raised by NumPy or json may have a documented class without a useful message.
    if not linecache.getline(frame.filename, frame.lineno or 0).lstrip().startswith("raise"):
        raise NotOursError(f"not raised by us: {type(error).__name__}: {text[:200]}") from error
    if not text.strip() or len(text) > LONGEST_MESSAGE:
        raise NotOursError(f"a message of {len(text)} characters: {text[:200]}") from error
    if kind.names_file and str(folder) not in text:
        raise NotOursError(f"the message names no file: {text[:200]}") from error
