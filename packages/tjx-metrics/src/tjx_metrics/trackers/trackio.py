"""A run in Trackio: a local database that ``trackio show`` draws."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from tjx_metrics.trackers.availability import check_trackers
from tjx_metrics.trackers.base import Histogram, Scalar, as_histogram, as_number


class TrackioTracker:
    """Write to Trackio's database, in ``TRACKIO_DIR`` on this machine.

    What is written is in the database, or an error was raised. A step's record that stands there
    already stays as it is, so that steps which a resumed run makes again stand once.

    Parameters
    ----------
    run_id : str
        The run; one that is there already is gone on with.
    project : str
        Which runs it stands beside.
    name : str
        What it is called there.

    Raises
    ------
    ValueError
        When Trackio is not installed, or cannot have a project of this name.
    """

    def __init__(self, run_id: str, *, project: str, name: str) -> None:
        check_trackers(["trackio"])
        import trackio
        import trackio.sqlite_storage

        self._markdown: Any = trackio.Markdown
        self._histogram: Any = trackio.Histogram
        # Not trackio.init, whose run prints, finds runs by name alone and hides what fails.
        self._storage: Any = trackio.sqlite_storage.SQLiteStorage
        self._storage.validate_project_name(project)
        self._run_id, self._project, self._name = run_id, project, name

    def log_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> None:
        """Write the settings; names that begin with ``_`` are Trackio's own and left out."""
        config = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in hyperparameters.items()
            if not name.startswith("_")
        }
        own = {"_Username": None, "_Created": datetime.now(UTC).isoformat(), "_Group": None}
        self._write({}, 0, config=config | own)

    def log(self, metrics: Mapping[str, Scalar], step: int) -> None:
        """Write numbers."""
        self._write({name: as_number(name, value) for name, value in metrics.items()}, step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Write histograms."""
        checked = {name: as_histogram(name, value) for name, value in histograms.items()}
        self._write(
            {
                name: self._histogram(np_histogram=tuple(value))._to_dict()
                for name, value in checked.items()
            },
            step,
        )

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Write texts, as they are: their Markdown is not drawn."""
        self._write(
            {name: self._markdown(f"```\n{text}\n```")._to_dict() for name, text in texts.items()},
            step,
        )

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the results that are numbers to the last step, as ``summary/NAME``."""
        numbers = {
            f"summary/{name}": value
            for name, value in summary.items()
            if isinstance(value, int | float)
        }
        last = self._storage.get_max_step_for_run(self._project, self._name, run_id=self._run_id)
        self._write(numbers, last or 0)

    def finish(self) -> None:
        """Do nothing: all is in its place."""

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
        """Name a record by what it is a record of: the database takes each name once."""
        return f"{self._run_id}/{step}/{'+'.join(sorted(names))}"
