"""Saving while the run goes on, and what follows from a save that fails."""

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
    """Saves the states of a run, records each save, and answers to those that fail.

    A run that stops for a failed save ends at the next step; one that continues says so, counts it
    as ``checkpoint/failed`` and tries again when the next save is due. What is saved last must be
    saved in either case: its failure is always raised.

    Parameters
    ----------
    checkpointer : tjx_ckpt.Checkpointer
        Saves in the background.
    tracker : tjx_metrics.Tracker
        Takes ``checkpoint/step``, ``checkpoint/blocking_seconds``, ``checkpoint/seconds`` and
        ``checkpoint/bytes``, once a save, at the step by which it was done or the next ones: no
        step has two, so that of two saves that are done by the last step one is not recorded.
    on_error : "stop" or "continue"
        What follows from a failed save.
    describe : callable
        What goes with the state of a step, as JSON; of whether its evaluation is still owed.
    flush_records : callable
        Brings the records to the disk; called in the background before a checkpoint is committed,
        so that a power cut never leaves a checkpoint whose records are lost.
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
        self._goes_on = on_error == "continue"
        self._describe, self._flush_records = describe, flush_records
        self._error: tjx_ckpt.SaveError | None = None
        self._failures = 0
        self._newest = checkpointer.last_save
        self._reports: deque[tjx_ckpt.SaveReport] = deque()
        self._recorded_at: int | None = None

    @property
    def failed(self) -> bool:
        """Whether a save failed such that the run is to end; see `stop_for_failure`."""
        return self._error is not None

    def look(self, step: int) -> None:
        """Record a save that is done by now, and note one that failed; never waits."""
        try:
            self._checkpointer.check()
        except tjx_ckpt.SaveError as error:
            self._note(error, step)
        self._gather()
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
        """Raise what failed; all processes do so at the same step.

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
        """Begin to save; the state's buffers may be donated when this returns.

        Parameters
        ----------
        step : int
            Steps that were made.
        state : TrainState
            What to save.
        metrics : mapping, optional
            The evaluation of this very step.
        owes_evaluation : bool
            Whether the evaluation of this step was due and is not made.
        prune : bool
            Whether older checkpoints may be deleted then.

        Raises
        ------
        tjx_ckpt.SaveError
            If the save before failed, where the run does not go on.
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
                self._answer(error, step)
                if error.step == step:
                    return
                begin()  # it was the save before that failed
        except tjx_ckpt.SaveError as error:
            self._answer(error, step)
        self._gather()

    def settle(self, step: int) -> None:
        """Wait for the save under way.

        Raises
        ------
        tjx_ckpt.SaveError
            If it failed, where the run does not go on.
        """
        try:
            self._checkpointer.wait()
        except tjx_ckpt.SaveError as error:
            self._answer(error, step)
        self.look(step)

    def finish(self, step: int) -> None:
        """Wait until the last save is on disk.

        Raises
        ------
        tjx_ckpt.SaveError
            If it failed, also where the run went on after others.
        """
        self._checkpointer.wait()
        self.look(step)

    def _gather(self) -> None:
        """Take the report of a save that is done since this was last called."""
        report = self._checkpointer.last_save
        if report is not None and report != self._newest:
            self._newest = report
            self._reports.append(report)

    def _answer(self, error: tjx_ckpt.SaveError, step: int) -> None:
        """Note a failure that all processes see at this step."""
        if not self._goes_on:
            raise error
        self._note(error, step)

    def _note(self, error: tjx_ckpt.SaveError, step: int) -> None:
        if not self._goes_on:
            self._error = error
            return
        self._failures += 1
        log_info(f"warning: {error}; the run goes on, the next save tries again")
        self._tracker.log({"checkpoint/failed": self._failures}, step)
