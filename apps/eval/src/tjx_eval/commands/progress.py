"""Progress of long evaluations: a bar in a terminal, periodic lines in files and pipes."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tjx_eval.scoring.score import ProgressCallback, no_progress

_EVERY = 30  # seconds between two lines


@contextmanager
def show_progress(label: str, *, enabled: bool = True) -> Iterator[ProgressCallback]:
    """Yield a callback (tokens done, total tokens or 0 if unknown) that reports on stderr."""
    if not enabled:
        yield no_progress
    elif sys.stderr.isatty():
        yield from _bar(label)
    else:
        yield _lines(label)


def _bar(label: str) -> Iterator[ProgressCallback]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(label), BarColumn(), TextColumn("{task.completed:,} tokens"),
        TextColumn("{task.fields[rate]:,.0f}/s"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None, rate=0.0)
        started = time.perf_counter()

        def update(done: int, total: int) -> None:
            rate = done / (time.perf_counter() - started)
            bar.update(task, completed=done, total=total or None, rate=rate)

        yield update


def _lines(label: str) -> ProgressCallback:
    started = last = time.perf_counter()

    def update(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= _EVERY:
            last = now
            of_total = f" of {total:,}" if total else ""
            rate = done / (now - started)
            sys.stderr.write(f"{label}: {done:,}{of_total} tokens, {rate:,.0f}/s\n")

    return update
