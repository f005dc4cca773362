"""A tracker: appends the training loss to a text file of the run."""

from collections.abc import Mapping

from tjx_metrics import CompositeTracker, Scalar, TrackedRun, register_tracker


class LossFile(CompositeTracker):
    """Lines of step and training loss; other records are ignored."""

    def __init__(self, run: TrackedRun) -> None:
        super().__init__([])  # forwards to no other tracker
        self.path = run.directory / "losses.txt"

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Append the training loss."""
        if "train/loss" in metrics:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{step} {float(metrics['train/loss'])}\n")


register_tracker(__name__, LossFile)
