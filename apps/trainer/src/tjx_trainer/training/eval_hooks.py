"""Periodic evaluation hooks: evaluation, text samples and weight histograms."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from tjx_trainer.runtime.preemption import PreemptionSync
from tjx_trainer.runtime.watchdog import Watchdog
from tjx_trainer.tasks.task import ResponseEvaluator
from tjx_trainer.training.build import Job
from tjx_trainer.training.checkpointing import CheckpointSaver
from tjx_trainer.training.evaluation import EvaluationInterruptedError
from tjx_trainer.training.metrics_logger import MetricsLogger
from tjx_trainer.training.train_state import TrainState


class EvalHooks:
    """Run evaluations, samples and weight histograms when their step is due.

    Parameters
    ----------
    job : Job
        The components of the run.
    logger : MetricsLogger
        Records the results.
    saver : CheckpointSaver
        Its failure is reported to the other processes during an evaluation.
    preemption : PreemptionSync
        Polled before each evaluation batch; a stop request interrupts the evaluation.
    watchdog : Watchdog
        Receives a heartbeat before each evaluation batch and each sample.
    """

    def __init__(
        self,
        job: Job,
        logger: MetricsLogger,
        saver: CheckpointSaver,
        preemption: PreemptionSync,
        watchdog: Watchdog,
    ) -> None:
        self._job, self._logger, self._saver = job, logger, saver
        self._preemption, self._watchdog = preemption, watchdog

    def due(self, step: int) -> bool:
        """Return whether an evaluation or a sample is due after `step`, before the next step."""
        return self._evaluation_due(step) or self._sample_due(step)

    def run(self, step: int, state: TrainState) -> Mapping[str, float] | None:
        """Evaluate and sample, where due after `step`.

        Parameters
        ----------
        step : int
            Number of updates made.
        state : TrainState
            The state after that step.

        Returns
        -------
        mapping or None
            Evaluation metrics by name, empty if no evaluation was due; None if a stop request
            interrupted the evaluation.
        """
        params, metrics = self._job.eval_params(state), None
        if self._evaluation_due(step):
            before = partial(self._before_batch, step)
            metrics = self._logger.evaluate(
                step,
                partial(self._job.evaluate, params, before),
                partial(self._job.evaluate_corpora, params, before),
            )
            if metrics is None:
                return None
            if isinstance(task := self._job.task, ResponseEvaluator):
                answers = partial(task.evaluate_responses, params)
                metrics = {**metrics, **self._logger.evaluate_responses(step, answers)}
        if self._sample_due(step):
            self._watchdog.beat("sample", step)
            self._logger.sample(step, partial(self._job.task.sample, params))
        return metrics or {}

    def weights(self, step: int, params: dict[str, Any]) -> dict[str, Any] | None:
        """Return the weight histograms of `params` if due; does not wait for the device."""
        if not _is_due(step, self._job.config.log.histograms_every):
            return None
        return self._job.weight_histograms(params)

    def _evaluation_due(self, step: int) -> bool:
        train = self._job.config.train
        return step == train.max_steps or step % train.eval_every == 0

    def _sample_due(self, step: int) -> bool:
        return _is_due(step, self._job.config.log.samples_every)

    def _before_batch(self, step: int) -> None:
        self._watchdog.beat("evaluate", step)
        self._preemption.poll(failed=self._saver.failed)
        if self._preemption.stop:
            raise EvaluationInterruptedError


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0
