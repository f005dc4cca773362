"""Console tracker: a progress bar in a terminal, periodic plain lines in files and pipes."""

import atexit
import io
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO, cast

from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tjx_metrics.performance.throughput import Throughput
from tjx_metrics.trackers.base import Histogram, Scalar, as_number
from tjx_metrics.trackers.status_line import Status

PLAIN_WIDTH = 80
BAR_WIDTH = 10  # smallest width of the bar; with less room the bar is omitted
REFRESH_SECONDS = 0.1
# Displayed metrics: field of `Status`, and its type.
_SHOWN: dict[str, tuple[str, type[int | float]]] = {
    "train/loss": ("loss", float),
    "eval/loss": ("eval_loss", float),
    "train/tokens_per_sec": ("tokens_per_sec", float),
    "train/mfu": ("mfu", float),
    "train/skipped": ("skipped", int),
    "checkpoint/step": ("saved", int),
    "checkpoint/failed": ("failed_saves", int),
}


class ConsoleTracker:
    """Show the progress of a run on standard error.

    In a terminal, a progress bar shows the step, losses, throughput and remaining time; other
    output is printed above it. A narrow terminal omits the bar first, then the least important
    fields. In a file or pipe, plain lines of at most 80 columns are printed after every
    evaluation, at the end, and otherwise every `plain_seconds`. Displayed metrics are
    ``train/loss``, ``eval/loss``, ``train/tokens_per_sec``, ``train/mfu``, ``train/skipped``,
    ``checkpoint/step`` and ``checkpoint/failed``.

    Parameters
    ----------
    max_steps : int
        Last step of the run.
    start_step : int
        Step from which the run resumed.
    throughput : Throughput or None
        Source of the throughput and remaining time; without it no remaining time is shown.
    plain_seconds : float
        Seconds between two plain lines.
    stream : text stream or None
        Output stream; None is standard error.
    clock : callable
        Returns monotonic seconds.
    """

    def __init__(
        self,
        max_steps: int,
        *,
        start_step: int = 0,
        throughput: Throughput | None = None,
        plain_seconds: float = 10.0,
        stream: io.TextIOBase | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._status = Status(start_step, max_steps)
        self._throughput = throughput
        self._plain_seconds = plain_seconds
        self._stream = sys.stderr if stream is None else cast(TextIO, stream)
        self._clock = clock
        self._drawn_at: float | None = None
        self._drawn_line = ""
        self._progress: Progress | None = None
        self._column = _StatusColumn()
        self._task = TaskID(0)
        self._finished = False
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Do nothing: hyperparameters are not displayed."""

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Update the displayed metrics; redraw periodically.

        After an evaluation and at the first training loss it redraws at once.

        Parameters
        ----------
        metrics : mapping from str to scalar
            Named metrics; unknown names are ignored.
        step : int
            Number of finished steps.
        """
        first_loss = self._status.loss is None and "train/loss" in metrics
        for name, (field, kind) in _SHOWN.items():
            if name in metrics:
                setattr(self._status, field, kind(as_number(name, metrics[name])))
        self._status.step = int(step)
        self._draw(now=first_loss or "eval/loss" in metrics)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Do nothing: histograms are not displayed."""

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Do nothing: texts are not displayed."""

    def update(self, step: int) -> None:
        """Advance the bar between two calls of `log`; cheap enough for every step."""
        self._status.step = int(step)
        self._draw(now=False)

    def note(self, text: str) -> None:
        """Print a message, above the bar if there is one."""
        if self._progress is not None:
            # Text, because square brackets are markup; soft wrap, so that paths are not split.
            self._progress.console.print(Text(text), soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Print the final status line and the results, one per line."""
        self.finish()
        width = max(map(len, summary), default=0)
        for name, value in summary.items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            self.note(f"{name:<{width}}  {shown}")

    def finish(self) -> None:
        """Print the final status line and restore the terminal. Idempotent."""
        if self._finished:
            return
        if self._drawn_at is not None:
            self._draw(now=True)
        self._finished = True
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            atexit.unregister(self.finish)

    def _draw(self, *, now: bool) -> None:
        if self._finished:
            return
        time_now = self._clock()
        pause = REFRESH_SECONDS if self._live else self._plain_seconds
        if not now and self._drawn_at is not None and time_now - self._drawn_at < pause:
            return
        if not self._live and not now and self._status.loss is None:
            return  # a plain line needs a loss
        self._drawn_at = time_now
        if self._throughput is not None:
            rate = self._throughput.tokens_per_sec
            self._status.tokens_per_sec = rate or self._status.tokens_per_sec
            self._status.seconds_left = self._throughput.seconds_left
        if self._live:
            self._draw_bar()
        else:
            line = self._status.line(PLAIN_WIDTH)
            if line != self._drawn_line:
                self._drawn_line = line
                print(line, file=self._stream, flush=True)

    def _draw_bar(self) -> None:
        if self._progress is None:
            self._progress = self._make_bar()
            self._task = self._progress.add_task(
                "", total=max(self._status.max_steps, 1), status=""
            )
        width = self._column.width = self._progress.console.width
        line = self._status.line(width)
        self._progress.update(self._task, completed=self._status.step, status=line)
        if self._progress.live.is_started:
            self._progress.refresh()
        else:
            self._progress.start()
            atexit.register(self.finish)  # restore the cursor if the process exits early

    def _make_bar(self) -> Progress:
        return Progress(
            self._column,
            console=Console(file=self._stream),
            auto_refresh=False,  # no extra thread
            # Do not redirect standard output when it is a file or pipe.
            redirect_stdout=sys.stdout.isatty(),
        )


class _StatusColumn(ProgressColumn):
    """The status line, after a bar if there is room."""

    width = PLAIN_WIDTH

    def render(self, task: Task) -> RenderableType:
        """Return one line, at most as wide as the terminal."""
        status = Text(task.fields["status"], no_wrap=True)
        room = self.width - status.cell_len - 1
        if room < BAR_WIDTH:
            return status
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(total=task.total, completed=task.completed, width=room), status)
        return row
