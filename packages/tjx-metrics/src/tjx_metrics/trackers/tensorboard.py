"""TensorBoard tracker: writes event files without TensorFlow."""

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tjx_metrics.trackers.availability import check_trackers
from tjx_metrics.trackers.base import Histogram, Scalar, as_histograms, as_numbers

# Metrics shown beside the hyperparameters in TensorBoard's HPARAMS tab.
RESULTS = ("train/loss", "eval/loss")


class TensorboardTracker:
    """Write scalars, histograms, texts and hyperparameters to TensorBoard event files.

    Each call either flushes its records to the file or raises.

    Parameters
    ----------
    folder : Path
        Folder for event files; each tracker writes a new file.
    resume_step : int or None
        Step from which the run resumes; TensorBoard hides existing records of later steps.

    Raises
    ------
    ValueError
        If tensorboardX is not installed.
    OSError
        If the file cannot be created.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        check_trackers(["tensorboard"])
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._summary, self._event = summary, Event
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard requires this prefix and reads files in the order of the timestamp; the
        # monotonic clock makes names of the same second unique.
        suffix = f"{int(time.time())}.{socket.gethostname()}.{time.monotonic_ns()}"
        self._writer: RecordWriter | None = RecordWriter(
            str(folder / f"events.out.tfevents.{suffix}")
        )
        self._write(Event(file_version="brain.Event:2"))
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=resume_step + 1, session_log=start))

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Write the hyperparameters as a text and for the HPARAMS tab."""
        text = json.dumps(hyperparameters, indent=2, default=str)
        flat = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in hyperparameters.items()
            if value is not None
        }
        experiment, start, _ = self._summary.hparams(flat, dict.fromkeys(RESULTS, 0.0))
        for part in (experiment, start, self._summary.text("hyperparameters", _as_code(text))):
            self._write(self._event(summary=part))

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Write all metrics as one event."""
        event = self._event(step=step)
        for name, value in as_numbers(metrics).items():
            event.summary.value.add(tag=name, simple_value=value)
        self._write(event)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Write histograms; their sums are computed from the bin centers."""
        event = self._event(step=step)
        for name, (counts, edges) in as_histograms(histograms).items():
            centers = (edges[:-1] + edges[1:]) / 2
            histogram = event.summary.value.add(tag=name).histo
            histogram.min, histogram.max = edges[0], edges[-1]
            histogram.num = int(counts.sum())
            histogram.sum = float(np.sum(counts * centers))
            histogram.sum_squares = float(np.sum(counts * centers**2))
            # Events store upper edges only: an empty first bin gives the lower edge of the next.
            histogram.bucket_limit.extend(edges.tolist())
            histogram.bucket.extend([0.0, *counts.tolist()])
        self._write(event)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Write texts as code blocks: line breaks are kept and Markdown is not rendered."""
        for name, text in texts.items():
            self._write(self._event(step=step, summary=self._summary.text(name, _as_code(text))))

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the results as a text."""
        text = json.dumps(summary, indent=2, default=str)
        self._write(self._event(summary=self._summary.text("summary", _as_code(text))))

    def finish(self) -> None:
        """Close the file. Idempotent."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _write(self, event: Any) -> None:
        if self._writer is None:
            raise ValueError("the tracker is finished: log before finish")
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def _as_code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
