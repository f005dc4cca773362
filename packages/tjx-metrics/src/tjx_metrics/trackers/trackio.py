"""Trackio tracker: a local database shown by ``trackio show``."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from tjx_metrics.trackers.availability import check_trackers
from tjx_metrics.trackers.base import Histogram, Scalar, as_histograms, as_numbers


class TrackioTracker:
    """Write records to Trackio's local database in ``TRACKIO_DIR``.

    Each call either writes to the database or raises. The first record of a step is kept, so steps
    that a resumed run repeats are stored once.

    Parameters
    ----------
    run_id : str
        Id of the run; an existing run is continued.
    project : str
        Project that the run belongs to.
    name : str
        Name of the run in Trackio.

    Raises
    ------
    ValueError
        If Trackio is not installed or rejects the project name.
    """

    def __init__(self, run_id: str, *, project: str, name: str) -> None:
        check_trackers(["trackio"])
        import trackio
        import trackio.sqlite_storage

        self._markdown: Any = trackio.Markdown
        self._histogram: Any = trackio.Histogram
        # Not trackio.init: its run prints, identifies runs by name and hides failures.
        self._storage: Any = trackio.sqlite_storage.SQLiteStorage
        self._storage.validate_project_name(project)
        self._run_id, self._project, self._name = run_id, project, name

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Write the hyperparameters; names with a leading ``_`` are reserved and skipped."""
        config = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in hyperparameters.items()
            if not name.startswith("_")
        }
        own = {"_Username": None, "_Created": datetime.now(UTC).isoformat(), "_Group": None}
        self._write({}, 0, config=config | own)

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Write metrics."""
        self._write(as_numbers(metrics), step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Write histograms."""
        self._write(
            {
                name: self._histogram(np_histogram=tuple(value))._to_dict()
                for name, value in as_histograms(histograms).items()
            },
            step,
        )

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Write texts as code blocks, so that their Markdown is not rendered."""
        self._write(
            {name: self._markdown(f"```\n{text}\n```")._to_dict() for name, text in texts.items()},
            step,
        )

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the numeric results to the last step, as ``summary/NAME``."""
        numbers = {
            f"summary/{name}": value
            for name, value in summary.items()
            if isinstance(value, int | float)
        }
        last = self._storage.get_max_step_for_run(self._project, self._name, run_id=self._run_id)
        self._write(numbers, last or 0)

    def finish(self) -> None:
        """Do nothing: every call has already written its records."""

    def _write(
        self, values: dict[str, Any], step: int, *, config: dict[str, Any] | None = None
    ) -> None:
        self._storage.bulk_log(
            project=self._project,
            run=self._name,
            run_id=self._run_id,
            metrics_list=[values],
            steps=[int(step)],
            log_ids=[self._log_id(values, step)],
            config=config,
        )

    def _log_id(self, names: Iterable[str], step: int) -> str:
        """Return a record id from its contents: the database stores each id once."""
        return f"{self._run_id}/{step}/{'+'.join(sorted(names))}"
