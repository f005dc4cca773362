"""Deletion of checkpoints that the retention policy does not keep."""

from collections.abc import Mapping

from tjx_ckpt.retention import Retention
from tjx_ckpt.store.manifest import ManifestError
from tjx_ckpt.store.manifest import read as read_manifest
from tjx_ckpt.store.storage import Storage


class Pruner:
    """Deletes checkpoints by a retention policy and caches the metrics of existing ones.

    Parameters
    ----------
    storage
        The checkpoints; locked while any is deleted.
    retention
        Which checkpoints to keep.
    """

    def __init__(self, storage: Storage, retention: Retention) -> None:
        self._storage, self._retention = storage, retention
        self._metrics: dict[int, Mapping[str, float]] = {}

    def remember(self, step: int, metrics: Mapping[str, float]) -> None:
        """Cache the metrics of a new checkpoint, so that its manifest is not read."""
        self._metrics[step] = metrics

    def prune(self) -> None:
        """Delete checkpoints that are not kept, and leftovers of failed deletions."""
        self._storage.remove_leftovers()
        metrics = {other: self._metrics_of(other) for other in self._storage.steps()}
        for other in self._retention.prunable(metrics):
            self.discard(other)

    def discard(self, step: int) -> None:
        """Delete a checkpoint and its cached metrics."""
        self._storage.discard(step)
        self._metrics.pop(step, None)

    def _metrics_of(self, step: int) -> Mapping[str, float]:
        if step not in self._metrics:
            try:
                self._metrics[step] = read_manifest(self._storage, step).metrics
            except ManifestError:
                self._metrics[step] = {}  # it can be one of the newest, not one of the best
        return self._metrics[step]
