"""Log lines of a run on standard error."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import tjx_parallel
from tjx_core import printable


def log_info(text: str) -> None:
    """Write a line to standard error, on process 0 only; standard output is for results."""
    if tjx_parallel.is_main():
        sys.stderr.write(printable(text) + "\n")


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print tjx's own warnings without file name and source line."""
    show = warnings.showwarning

    def write(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category.__module__.startswith("tjx_"):
            sys.stderr.write(printable(f"warning: {message}\n"))
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = write
    try:
        yield
    finally:
        warnings.showwarning = show
