"""Background checkpointing of a run, with logging and error handling of saves."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

import tjx_ckpt
import tjx_metrics
from tjx_trainer.runtime.run_logging import log_info
from tjx_trainer.training.train_state import TrainState

CHECKPOINT_BYTES = "checkpoint/bytes"
"""A metric that is only recorded of a checkpoint that is durable."""


class CheckpointSaver:
    """Save the states of a run in the background, log each save, and handle failures.

    With ``checkpoint.on_error stop`` a failed save ends the run at the next step; with ``continue``
    it is logged as ``checkpoint/failed`` and the next save tries again. A failure of the final save
    is always raised.

    Parameters
    ----------
    checkpointer : tjx_ckpt.Checkpointer
        Writes the checkpoints.
    tracker : tjx_metrics.Tracker
        Receives ``checkpoint/step``, ``checkpoint/blocking_seconds``, ``checkpoint/seconds`` and
        ``checkpoint/bytes`` once per save. At most one save is logged per step, so of two saves
        that finish by the last step one is not logged.
    on_error : "stop" or "continue"
        Handling of a failed save.
    describe : callable
        From whether the evaluation of the step is still pending to the metadata of the checkpoint
        (JSON).
    flush_records : callable
        Flushes the metrics to disk. Called in the background before a checkpoint is committed, so
        that a power loss never leaves a checkpoint without its metrics.
    """

    def __init__(
        self,
        checkpointer: tjx_ckpt.Checkpointer,
        tracker: tjx_metrics.Tracker,
        *,
        on_error: Literal["stop", "continue"],
        describe: Callable[[bool], dict[str, Any]],
        flush_records: Callable[[], object],
    ) -> None:
        self._checkpointer, self._tracker = checkpointer, tracker
        self._continue_on_error = on_error == "continue"
        self._describe, self._flush_records = describe, flush_records
        self._error: tjx_ckpt.SaveError | None = None
        self._failures = 0
        self._newest = checkpointer.last_save
        self._reports: deque[tjx_ckpt.SaveReport] = deque()
        self._recorded_at: int | None = None

    @property
    def failed(self) -> bool:
        """Whether a failed save ends the run; see `stop_for_failure`."""
        return self._error is not None

    def poll(self, step: int) -> None:
        """Log a finished save and note a failed one, without waiting."""
        try:
            self._checkpointer.check()
        except tjx_ckpt.SaveError as error:
            self._note_error(error, step)
        self._collect_report()
        if self._reports and self._recorded_at != step:
            self._recorded_at = step
            report = self._reports.popleft()
            figures = {
                "checkpoint/step": report.step,
                "checkpoint/blocking_seconds": report.blocking_seconds,
                "checkpoint/seconds": report.seconds,
                CHECKPOINT_BYTES: report.size_bytes,
            }
            self._tracker.log(figures, step)

    def stop_for_failure(self, step: int) -> None:
        """Raise the error of the failed save; all processes do so at the same step.

        Raises
        ------
        tjx_ckpt.SaveError
            Always.
        """
        raise self._error or tjx_ckpt.SaveError(
            step, RuntimeError("another process could not save; its log says why")
        )

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        metrics: Mapping[str, float] | None = None,
        evaluation_pending: bool = False,
        prune: bool = True,
    ) -> None:
        """Start a save. The buffers of the state may be donated after this returns.

        Parameters
        ----------
        step : int
            Number of updates made.
        state : TrainState
            The state to save.
        metrics : mapping, optional
            Metrics of an evaluation of this step.
        evaluation_pending : bool
            Whether the evaluation of this step was due and is not complete.
        prune : bool
            Whether older checkpoints may be deleted after the save.

        Raises
        ------
        tjx_ckpt.SaveError
            If the previous save failed and ``checkpoint.on_error`` is "stop".
        """

        def begin() -> None:
            metadata = self._describe(evaluation_pending)
            self._checkpointer.save(
                step,
                state,
                metadata=metadata,
                metrics=metrics,
                prune=prune,
                before_commit=self._flush_records,
            )

        try:
            try:
                begin()
            except tjx_ckpt.SaveError as error:
                self._handle_error(error, step)
                if error.step == step:
                    return
                begin()  # the previous save failed, not this one
        except tjx_ckpt.SaveError as error:
            self._handle_error(error, step)
        self._collect_report()

    def settle(self, step: int) -> None:
        """Wait for the save in progress.

        Raises
        ------
        tjx_ckpt.SaveError
            If it failed and ``checkpoint.on_error`` is "stop".
        """
        try:
            self._checkpointer.wait()
        except tjx_ckpt.SaveError as error:
            self._handle_error(error, step)
        self.poll(step)

    def finish(self, step: int) -> None:
        """Wait for the final save.

        Raises
        ------
        tjx_ckpt.SaveError
            If it failed, whatever ``checkpoint.on_error`` is.
        """
        self._checkpointer.wait()
        self.poll(step)

    def _collect_report(self) -> None:
        """Queue the report of a save that finished since the last call."""
        report = self._checkpointer.last_save
        if report is not None and report != self._newest:
            self._newest = report
            self._reports.append(report)

    def _handle_error(self, error: tjx_ckpt.SaveError, step: int) -> None:
        """Handle a failure that all processes see at this step."""
        if not self._continue_on_error:
            raise error
        self._note_error(error, step)

    def _note_error(self, error: tjx_ckpt.SaveError, step: int) -> None:
        if not self._continue_on_error:
            self._error = error
            return
        self._failures += 1
        log_info(f"warning: {error}; training continues and the next save retries")
        self._tracker.log({"checkpoint/failed": self._failures}, step)
