"""What a run tells while it goes: metrics to the trackers, one step late."""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

import tjx_metrics
from tjx_trainer.evaluation import Evaluation, EvaluationLeftError
from tjx_trainer.exit_codes import NotFiniteError
from tjx_trainer.step import Metrics


class Progress:
    """Reads each step's metrics when the next step is already under way.

    Parameters
    ----------
    tracker : tjx_metrics.Tracker
        Where numbers go.
    throughput : tjx_metrics.Throughput
        Told of each step that is done.
    every : int
        Steps between two records of training metrics; a step that was skipped is always recorded.
    max_skipped : int
        Steps in a row that are skipped for not being finite when the run ends.
    skipped : int
        Steps that were skipped before.

    Attributes
    ----------
    last_evaluation : Evaluation or None
        The last one that was finished.
    streak_began : int or None
        After NotFiniteError the first of the steps in a row that were skipped.
    """

    def __init__(
        self,
        tracker: tjx_metrics.Tracker,
        throughput: tjx_metrics.Throughput,
        *,
        every: int,
        max_skipped: int,
        skipped: int = 0,
    ) -> None:
        self._tracker = tracker
        self._throughput = throughput
        self._every = every
        self._max_skipped = max_skipped
        self._skipped = skipped
        self._pending: tuple[int, Metrics] | None = None
        # The first of the steps in a row that were skipped last, of those that were seen.
        self._first_skipped: int | None = None
        # Since the last record: when that was, and the seconds that steps waited for data.
        self._recorded, self._waited = time.perf_counter(), 0.0
        self.last_evaluation: Evaluation | None = None
        self.streak_began: int | None = None

    def stepped(self, step: int, metrics: Metrics, *, waited: float) -> None:
        """Take a step's metrics, which may not be computed yet; read those of the step before.

        Parameters
        ----------
        step : int
            1 is the first.
        metrics : Metrics
            As the training step gives them.
        waited : float
            Seconds that the step waited for its batch.
        """
        self._waited += waited
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Wait for the last step's metrics and record them where it is their turn.

        Raises
        ------
        NotFiniteError
            When as many steps in a row were skipped as may be.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = jax.device_get(metrics)
        self._throughput.update(int(values.pop("tokens")))
        skipped, in_a_row = int(values["skipped"]), int(values.pop("skipped_in_a_row"))
        is_news, self._skipped = skipped != self._skipped, skipped
        self._first_skipped = (self._first_skipped or step) if is_news else None
        if step == 1 or step % self._every == 0 or is_news:
            record = _norm_records(values.pop("norms", {}))
            record |= {f"train/{name}": float(value) for name, value in values.items()}
            if (rate := self._throughput.tokens_per_sec) is not None:
                record["train/tokens_per_sec"] = rate
            record["train/data_wait"] = self._share_waited()
            self._tracker.log(record, step)
        if in_a_row >= self._max_skipped:
            # A run that was gone on with in the midst of them has seen the last of them only.
            begin = step - in_a_row + 1
            self.streak_began = min(begin, self._first_skipped or begin)
            raise NotFiniteError(step, in_a_row)

    def evaluate(self, step: int, run: Callable[[], Evaluation]) -> Mapping[str, float] | None:
        """Evaluate and record; the time it takes counts for no rate.

        Parameters
        ----------
        step : int
            Steps that were made.
        run : callable
            Evaluates, or raises `EvaluationLeftError`.

        Returns
        -------
        mapping or None
            What was recorded, by name; None where the evaluation was left.
        """
        self.flush()
        begin = time.perf_counter()
        try:
            with self._throughput.paused():
                self.last_evaluation = run()
        except EvaluationLeftError:
            return None
        self._recorded += time.perf_counter() - begin
        found = self.last_evaluation.metrics()
        metrics = {f"eval/{name}": value for name, value in found.items()}
        self._tracker.log(metrics, step)
        return metrics

    def _share_waited(self) -> float:
        """Return the share of the time since the last record that went by without a batch."""
        now = time.perf_counter()
        share = self._waited / (now - self._recorded)
        self._recorded, self._waited = now, 0.0
        return share


def _norm_records(norms: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Name each norm by kind, parameter and layer: ``norms/gradient/blocks/mlp/up/kernel/3``."""
    return {
        "/".join(["norms", kind, path, *map(str, index)]): float(value)
        for kind, by_path in norms.items()
        for path, array in by_path.items()
        for index, value in np.ndenumerate(array)
    }
