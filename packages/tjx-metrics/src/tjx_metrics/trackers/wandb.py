"""A run in Weights & Biases, on its servers or, with ``WANDB_MODE=offline``, in files."""

import atexit
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tjx_metrics.trackers.availability import check_trackers
from tjx_metrics.trackers.base import Histogram, Scalar, as_histogram, as_number

MAX_BINS = 512  # of a histogram; W&B refuses more
EXIT_SECONDS = 5.0  # that a service which answers no more may hold up the end of the process


class WandbTracker:
    """Hand a run to W&B's service process, which writes and sends it.

    ``step`` is the horizontal axis of everything, and not W&B's own count of records: that one
    cannot go back, as a run does that goes on from its last checkpoint. Steps that are made again
    stand there twice.

    ``WANDB_MODE`` and W&B's other settings hold. A service that was killed, or answers no more,
    does not hold up the end of the process.

    Parameters
    ----------
    run_id : str
        The run; one that is there already is gone on with.
    directory : Path
        Where W&B makes its folder ``wandb`` with what ``wandb sync`` sends.
    project : str
        Which runs it stands beside.
    name : str
        What it is called there.

    Raises
    ------
    ValueError
        When wandb is not installed.
    wandb.Error
        When W&B does not let it in, or cannot be reached.
    """

    def __init__(self, run_id: str, *, directory: Path, project: str, name: str) -> None:
        check_trackers(["wandb"])
        import wandb

        self._wandb: Any = wandb
        self._end = threading.Event()
        self._ended = threading.Event()
        # Python starts no thread when it ends: the one that ends the service waits from now on.
        threading.Thread(target=self._end_service, name="wandb-end", daemon=True).start()
        # The console is ours: W&B neither copies what is printed nor prints over the bar, nor asks
        # for a key there, which is an error instead.
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
        # Functions that are registered later run earlier: this one before that of the service.
        atexit.register(self._leave)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Give the settings to the run."""
        self._run.config.update(dict(hyperparameters), allow_val_change=True)

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Give numbers to the run."""
        self._log({name: as_number(name, value) for name, value in metrics.items()}, step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Give histograms to the run; bins beyond 512 are added up, several to one."""
        made = {}
        for name, value in histograms.items():
            counts, edges = _at_most_bins(as_histogram(name, value))
            made[name] = self._wandb.Histogram(np_histogram=(counts, edges))
        self._log(made, step)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Give texts to the run, as plain text."""
        # As a table they would be files; as HTML they stand beside the curves.
        made = {
            name: self._wandb.Html(_as_page(text), inject=False) for name, text in texts.items()
        }
        self._log(made, step)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Give the results to the run's summary."""
        self._run.summary.update(dict(summary))

    def finish(self) -> None:
        """Wait until the service has brought everything to its place. Twice is once."""
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
        """End a service that may be dead, and wait a bounded time."""
        atexit.unregister(self._leave)
        self._end.set()
        self._ended.wait(EXIT_SECONDS)

    def _end_service(self) -> None:
        self._end.wait()
        if not self._ended.is_set():
            # It waits for the service; what it unregisters first would wait at the process's end.
            with suppress(Exception):
                self._wandb.teardown()
            self._ended.set()


def _at_most_bins(histogram: Histogram) -> Histogram:
    counts, edges = histogram
    begins = np.arange(0, counts.size, -(-counts.size // MAX_BINS))
    return Histogram(np.add.reduceat(counts, begins), np.append(edges[begins], edges[-1]))


def _as_page(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<pre style="white-space: pre-wrap">{escaped}</pre>'
