"""Deleting the checkpoints that need not stay."""

from collections.abc import Mapping

from tjx_ckpt.retention import Retention
from tjx_ckpt.store.manifest import ManifestError
from tjx_ckpt.store.manifest import read as read_manifest
from tjx_ckpt.store.storage import Storage


class Pruner:
    """Deletes checkpoints, and remembers the metrics of those that are there.

    Parameters
    ----------
    storage
        Where they lie; locked while anything is deleted.
    retention
        Which of them stay.
    """

    def __init__(self, storage: Storage, retention: Retention) -> None:
        self._storage, self._retention = storage, retention
        self._metrics: dict[int, Mapping[str, float]] = {}

    def remember(self, step: int, metrics: Mapping[str, float]) -> None:
        """Remember the metrics of a checkpoint that was just saved, so that they are not read."""
        self._metrics[step] = metrics

    def prune(self) -> None:
        """Delete what need not stay, and what an earlier deletion that failed has left."""
        self._storage.remove_leftovers()
        here = {other: self._metrics_of(other) for other in self._storage.steps()}
        for other in self._retention.doomed(here):
            self.discard(other)

    def discard(self, step: int) -> None:
        """Delete a checkpoint."""
        self._storage.discard(step)
        self._metrics.pop(step, None)

    def _metrics_of(self, step: int) -> Mapping[str, float]:
        if step not in self._metrics:
            try:
                self._metrics[step] = read_manifest(self._storage, step).metrics
            except ManifestError:
                self._metrics[step] = {}  # it counts among the newest, not among the best
        return self._metrics[step]
