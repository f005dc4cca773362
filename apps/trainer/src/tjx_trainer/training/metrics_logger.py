"""Metrics logging, one step behind the device."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import tjx_metrics
from tjx_trainer.runtime.exit_codes import NotFiniteError
from tjx_trainer.training.evaluation import EvaluationInterruptedError
from tjx_trainer.training.step_timer import Scalars, StepTimer
from tjx_trainer.training.train_step import Metrics

PARAMETER_HISTOGRAMS = "histograms/parameter"
SAMPLE_TEXT = "samples/text"
_CORPUS_METRICS = ("loss", "bits_per_byte")


class MetricsLogger:
    """Read the metrics of each step while the next step runs, and log them to the tracker.

    Parameters
    ----------
    tracker : tjx_metrics.Tracker
        Destination of the metrics.
    step_timer : StepTimer
        Receives each finished step and the time of each phase.
    log : tjx_metrics.LogConfig
        Logging intervals; skipped steps are always logged.
    max_skipped : int
        Consecutive skipped steps that end the run.
    skipped : int
        Steps that were skipped before.

    Attributes
    ----------
    last_evaluation : tjx_metrics.Evaluation or None
        The last complete evaluation.
    best_loss : float or None
        The lowest evaluation loss of this process [nats/label].
    streak_start : int or None
        After NotFiniteError, the first step of the streak of skipped steps.
    """

    def __init__(
        self,
        tracker: tjx_metrics.Tracker,
        step_timer: StepTimer,
        log: tjx_metrics.LogConfig,
        *,
        max_skipped: int,
        skipped: int = 0,
    ) -> None:
        self.step_timer = step_timer
        self._tracker = tracker
        self._log = log
        self._max_skipped = max_skipped
        self._skipped = skipped
        self._pending: tuple[int, Metrics] | None = None
        # First step of the current streak of skipped steps, as far as it was read.
        self._first_skipped: int | None = None
        self.last_evaluation: tjx_metrics.Evaluation | None = None
        self.best_loss: float | None = None
        self.streak_start: int | None = None

    @property
    def in_nonfinite_streak(self) -> bool:
        """Whether the last step that was read was skipped as non-finite."""
        return self._first_skipped is not None

    def record_step(
        self, step: int, metrics: Metrics, *, spreads: Mapping[str, Any] | None = None
    ) -> None:
        """Queue the metrics of a step, and log those of the previous step.

        Parameters
        ----------
        step : int
            Step number; the first is 1.
        metrics : Metrics
            Metrics of the train step; may not be computed yet.
        spreads : mapping, optional
            Histograms of the parameters after the step, from `tjx_metrics.weight_histograms`.
        """
        self.flush()
        self._pending = (step, metrics if spreads is None else {**metrics, "spreads": spreads})

    def flush(self) -> None:
        """Wait for the queued metrics and log them if due.

        Raises
        ------
        NotFiniteError
            If ``max_skipped`` consecutive steps were skipped.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        with self.step_timer.during("device"):
            values = jax.device_get(metrics)
        self.step_timer.record_step(int(values.pop("tokens")))
        skipped, in_a_row = int(values["skipped"]), int(values.pop("skipped_in_a_row"))
        is_news, self._skipped = skipped != self._skipped, skipped
        self._first_skipped = (self._first_skipped or step) if is_news else None
        norms, spreads = values.pop("norms", {}), values.pop("spreads", {})
        record: Scalars = {}
        if self._log.layer_norms_every is not None and step % self._log.layer_norms_every == 0:
            record |= _norm_records(norms)
        if step == 1 or step % self._log.every == 0 or is_news:
            record |= {f"train/{name}": float(value) for name, value in values.items()}
            record |= self.step_timer.figures()
        if record:
            self._tracker.log(record, step)
        if spreads:
            self._tracker.log_histograms(
                tjx_metrics.named_histograms(spreads, PARAMETER_HISTOGRAMS), step
            )
        if in_a_row >= self._max_skipped:
            # A run that was resumed within a streak has seen only its last steps.
            begin = step - in_a_row + 1
            self.streak_start = min(begin, self._first_skipped or begin)
            raise NotFiniteError(step, in_a_row)

    def evaluate(
        self,
        step: int,
        run: Callable[[], tjx_metrics.Evaluation],
        run_by_corpus: Callable[[], Mapping[str, tjx_metrics.Evaluation]],
    ) -> Mapping[str, float] | None:
        """Run and log an evaluation; its time does not count towards throughput.

        Parameters
        ----------
        step : int
            Number of updates made.
        run, run_by_corpus : callable
            Evaluate all data and each corpus of a mixture, or raise `EvaluationInterruptedError`.

        Returns
        -------
        mapping or None
            The logged metrics by name; None if the evaluation was interrupted.
        """
        self.flush()
        try:
            with self.step_timer.paused("evaluation"):
                evaluation, by_corpus = run(), run_by_corpus()
        except EvaluationInterruptedError:
            return None
        self.last_evaluation = evaluation
        found = self.last_evaluation.metrics()
        self.best_loss = min(
            found["loss"], found["loss"] if self.best_loss is None else self.best_loss
        )
        metrics = {f"eval/{name}": value for name, value in found.items()}
        for corpus, evaluation in by_corpus.items():
            values = evaluation.metrics()
            metrics |= {f"eval/{n}/{corpus}": values[n] for n in _CORPUS_METRICS if n in values}
        self._tracker.log(metrics, step)
        return metrics

    def evaluate_responses(
        self, step: int, run: Callable[[], Mapping[str, float]]
    ) -> Mapping[str, float]:
        """Evaluate and log the responses to held-out prompts; return the metrics by name."""
        with self.step_timer.paused("evaluation"):
            metrics = {f"eval/{name}": value for name, value in run().items()}
        self._tracker.log(metrics, step)
        return metrics

    def sample(self, step: int, write: Callable[[], str | None]) -> None:
        """Generate and log a text sample."""
        self.flush()
        with self.step_timer.paused("evaluation"):
            text = write()
        if text is not None:
            self._tracker.log_texts({SAMPLE_TEXT: text}, step)


def _norm_records(norms: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Name each norm by kind, parameter and layer: ``norms/gradient/blocks/mlp/up/kernel/3``."""
    return {
        "/".join(["norms", kind, path, *map(str, index)]): float(value)
        for kind, by_path in norms.items()
        for path, array in by_path.items()
        for index, value in np.ndenumerate(array)
    }
