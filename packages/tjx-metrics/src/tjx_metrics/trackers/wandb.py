"""Weights & Biases tracker: online, or in local files with ``WANDB_MODE=offline``."""

import atexit
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tjx_metrics.trackers.availability import check_trackers
from tjx_metrics.trackers.base import Histogram, Scalar, as_histograms, as_numbers

MAX_BINS = 512  # W&B's limit per histogram
EXIT_SECONDS = 5.0  # longest delay of the process's exit by an unresponsive service


class WandbTracker:
    """Send records to W&B's service process, which stores and uploads them.

    The x axis is the metric ``step`` and not W&B's own step, which cannot decrease when a run
    resumes from a checkpoint. Repeated steps are stored twice.

    ``WANDB_MODE`` and other W&B settings apply. A killed or unresponsive service does not block the
    exit of the process.

    Parameters
    ----------
    run_id : str
        Id of the run; an existing run is continued.
    directory : Path
        Parent of W&B's folder ``wandb``, which ``wandb sync`` uploads.
    project : str
        Project that the run belongs to.
    name : str
        Name of the run in W&B.

    Raises
    ------
    ValueError
        If wandb is not installed.
    wandb.Error
        If W&B rejects the login or is unreachable.
    """

    def __init__(self, run_id: str, *, directory: Path, project: str, name: str) -> None:
        check_trackers(["wandb"])
        import wandb

        self._wandb: Any = wandb
        self._end = threading.Event()
        self._ended = threading.Event()
        # Python cannot start threads at exit, so the thread that ends the service starts now.
        threading.Thread(target=self._end_service, name="wandb-end", daemon=True).start()
        # W&B must not capture the console, print over the progress bar, or prompt for a key: a
        # missing key is an error.
        settings = self._wandb.Settings(console="off", silent=True)
        self._wandb.setup(settings)
        self._run: Any = self._wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            dir=directory,
            settings=settings,
        )
        # atexit runs functions in reverse order: this one runs before the one of the service.
        atexit.register(self._leave)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Update the run's config."""
        self._run.config.update(dict(hyperparameters), allow_val_change=True)

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Log metrics."""
        self._log(as_numbers(metrics), step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Log histograms; adjacent bins are merged so that there are at most 512."""
        self._log(
            {
                name: self._wandb.Histogram(np_histogram=tuple(_at_most_bins(value)))
                for name, value in as_histograms(histograms).items()
            },
            step,
        )

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Log texts as HTML with preserved whitespace; W&B stores tables of texts as files."""
        self._log(
            {name: self._wandb.Html(_as_html(text), inject=False) for name, text in texts.items()},
            step,
        )

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Update the run's summary."""
        self._run.summary.update(dict(summary))

    def finish(self) -> None:
        """Block until the service has stored all records. Idempotent."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.finish()
        except Exception:
            self._leave()
            raise
        atexit.unregister(self._leave)
        self._ended.set()
        self._end.set()

    def _log(self, values: dict[str, Any], step: int) -> None:
        self._run.log({"step": step, **values})

    def _leave(self) -> None:
        """End a service that may be dead, and wait at most `EXIT_SECONDS`."""
        atexit.unregister(self._leave)
        self._end.set()
        self._ended.wait(EXIT_SECONDS)

    def _end_service(self) -> None:
        self._end.wait()
        if not self._ended.is_set():
            # Blocks on the service, but first unregisters W&B's own hook that would block the exit.
            with suppress(Exception):
                self._wandb.teardown()
            self._ended.set()


def _at_most_bins(histogram: Histogram) -> Histogram:
    counts, edges = histogram
    starts = np.arange(0, counts.size, -(-counts.size // MAX_BINS))
    return Histogram(np.add.reduceat(counts, starts), np.append(edges[starts], edges[-1]))


def _as_html(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<pre style="white-space: pre-wrap">{escaped}</pre>'
