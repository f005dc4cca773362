"""A run as TensorBoard's event files, without TensorFlow."""

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tjx_metrics.trackers.availability import check_trackers
from tjx_metrics.trackers.base import Histogram, Scalar, as_histogram, as_number

# What the table of runs in TensorBoard's HPARAMS tab shows beside the settings.
RESULTS = ("train/loss", "eval/loss")


class TensorboardTracker:
    """Write scalars, histograms, texts and settings where ``tensorboard --logdir`` shows them.

    Each call brings what it was given to the disk before it returns, or raises.

    Parameters
    ----------
    folder : Path
        Where event files go; each tracker writes a file of its own.
    resume_step : int or None
        Step from which the run goes on: what stands there of later steps is hidden from then on.

    Raises
    ------
    ValueError
        When tensorboardX is not installed.
    OSError
        When the file cannot be made.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        check_trackers(["tensorboard"])
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._summary, self._event = summary, Event
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard looks for this name, and reads files in the order of the time in it; one that
        # is made in the same second is another file.
        made = f"{int(time.time())}.{socket.gethostname()}.{time.monotonic_ns()}"
        self._writer: RecordWriter | None = RecordWriter(
            str(folder / f"events.out.tfevents.{made}")
        )
        self._write(Event(file_version="brain.Event:2"))
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=resume_step + 1, session_log=start))

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Write the settings as a text, and for the HPARAMS tab."""
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
        """Write numbers, all of them as one event."""
        event = self._event(step=step)
        for name, value in metrics.items():
            event.summary.value.add(tag=name, simple_value=as_number(name, value))
        self._write(event)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Write histograms; TensorBoard's sums are those of the bins' middles."""
        event = self._event(step=step)
        for name, given in histograms.items():
            counts, edges = as_histogram(name, given)
            middles = (edges[:-1] + edges[1:]) / 2
            histogram = event.summary.value.add(tag=name).histo
            histogram.min, histogram.max = edges[0], edges[-1]
            histogram.num = int(counts.sum())
            histogram.sum = float(np.sum(counts * middles))
            histogram.sum_squares = float(np.sum(counts * middles**2))
            # A first bin that is empty says where the next one begins: an event has upper edges.
            histogram.bucket_limit.extend(edges.tolist())
            histogram.bucket.extend([0.0, *counts.tolist()])
        self._write(event)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Write texts, as they are: their line breaks stay, their Markdown is not drawn."""
        for name, text in texts.items():
            self._write(self._event(step=step, summary=self._summary.text(name, _as_code(text))))

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the results as a text."""
        text = json.dumps(summary, indent=2, default=str)
        self._write(self._event(summary=self._summary.text("summary", _as_code(text))))

    def finish(self) -> None:
        """Close the file. Twice is once."""
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
