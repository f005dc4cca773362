"""Where a run stands, in words."""

import sys

import tjx_parallel


def say(text: str) -> None:
    """Tell the user on standard error, once for all processes; standard output is for results."""
    if tjx_parallel.is_main():
        sys.stderr.write(text + "\n")
