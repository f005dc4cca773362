"""How far a long evaluation is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tjx_eval.scoring.score import ProgressCallback, nobody

_EVERY = 30  # seconds between two lines


@contextmanager
def progress(what: str, *, shown: bool = True) -> Iterator[ProgressCallback]:
    """Give a function that is told (tokens done, tokens in all, 0 for unknown); stderr shows it."""
    if not shown:
        yield nobody
    elif sys.stderr.isatty():
        yield from _bar(what)
    else:
        yield _lines(what)


def _bar(what: str) -> Iterator[ProgressCallback]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what), BarColumn(), TextColumn("{task.completed:,} tokens"),
        TextColumn("{task.fields[rate]:,.0f}/s"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, rate=0.0)
        started = time.perf_counter()

        def told(done: int, total: int) -> None:
            rate = done / (time.perf_counter() - started)
            bar.update(task, completed=done, total=total or None, rate=rate)

        yield told


def _lines(what: str) -> ProgressCallback:
    started = last = time.perf_counter()

    def told(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= _EVERY:
            last = now
            of_all = f" of {total:,}" if total else ""
            rate = done / (now - started)
            sys.stderr.write(f"{what}: {done:,}{of_all} tokens, {rate:,.0f}/s\n")

    return told
