"""Where a run stands, in words."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import tjx_parallel
from tjx_ckpt.cli.terminal import printable


def log_info(text: str) -> None:
    """Tell the user on standard error, once for all processes; standard output is for results."""
    if tjx_parallel.is_main():
        sys.stderr.write(printable(text) + "\n")


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show tjx's own warnings as what they say, without a line of code that users do not know."""
    show = warnings.showwarning

    def tell(
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

    warnings.showwarning = tell
    try:
        yield
    finally:
        warnings.showwarning = show
