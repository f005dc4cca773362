"""What is looked at besides the loss of each step, and when: evaluations, samples, weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from tjx_trainer.runtime.preemption import PreemptionSync
from tjx_trainer.runtime.watchdog import Watchdog
from tjx_trainer.training.build import Job
from tjx_trainer.training.checkpointing import CheckpointSaver
from tjx_trainer.training.evaluation import EvaluationInterruptedError
from tjx_trainer.training.metrics_logger import MetricsLogger
from tjx_trainer.training.train_state import TrainState


class EvalHooks:
    """Takes the looks at a run that its configuration asks for, each a function of the step.

    Parameters
    ----------
    job : Job
        The parts of the run.
    progress : Progress
        Records what was seen.
    saver : Saver
        Whether a save failed, so that the run is to end.
    requests : Requests
        Whether somebody has asked to stop.
    watchdog : Watchdog
        Told of each evaluation batch and each sample.
    """

    def __init__(
        self,
        job: Job,
        progress: MetricsLogger,
        saver: CheckpointSaver,
        preemption: PreemptionSync,
        watchdog: Watchdog,
    ) -> None:
        self._job, self._progress, self._saver = job, progress, saver
        self._requests, self._watchdog = preemption, watchdog

    def due(self, step: int) -> bool:
        """Tell whether something is to be looked at after a step, before the next."""
        return self._evaluates(step) or self._samples(step)

    def take(self, step: int, state: TrainState) -> Mapping[str, float] | None:
        """Evaluate, and let the model write, where it is their turn.

        Parameters
        ----------
        step : int
            Steps that were made.
        state : TrainState
            After that step.

        Returns
        -------
        mapping or None
            The evaluation's metrics by name, none where it was not its turn; None where all of it
            is still to be made, as somebody asked to stop.
        """
        params, metrics = self._job.eval_params(state), None
        if self._evaluates(step):
            run = partial(self._job.evaluate, params, partial(self._before_batch, step))
            if (metrics := self._progress.evaluate(step, run)) is None:
                return None
        if self._samples(step):
            self._watchdog.beat("sample", step)
            self._progress.sample(step, partial(self._job.task.sample, params))
        return metrics or {}

    def weights(self, step: int, params: dict[str, Any]) -> dict[str, Any] | None:
        """Return the spreads of the parameters where it is their turn; nothing waits for them."""
        if not _is_turn(step, self._job.config.log.histograms_every):
            return None
        return self._job.weight_histograms(params)

    def _evaluates(self, step: int) -> bool:
        train = self._job.config.train
        return step == train.max_steps or step % train.eval_every == 0

    def _samples(self, step: int) -> bool:
        return _is_turn(step, self._job.config.log.samples_every)

    def _before_batch(self, step: int) -> None:
        self._watchdog.beat("evaluate", step)
        self._requests.poll(failed=self._saver.failed)
        if self._requests.stop:
            raise EvaluationInterruptedError


def _is_turn(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0
