"""Read the records of a run as NumPy arrays."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tjx_core import did_you_mean, nearest_names, printable
from tjx_metrics.trackers.jsonl_file import read_metrics

_MOST_BYTES = 64 << 20
XAxis = Literal["steps", "tokens", "hours"]
X_LABELS = {"steps": "Step", "tokens": "Tokens", "hours": "Hours"}
_X_METRICS = {"tokens": "train/tokens", "hours": "train/hours"}
Series = tuple[NDArray[Any], NDArray[Any]]
Paths = str | Path | Sequence[str | Path]


class RunDataError(ValueError):
    """Raised if a run cannot be read or lacks requested records; the message has advice."""


class NoDataError(RunDataError):
    """Raised if a run has no records for a plot."""


@dataclass(frozen=True)
class RunData:
    """The records of a run.

    Attributes
    ----------
    name : str
        Name of the run in plots.
    path : Path
        Metrics file.
    records : list of dict
        Result of `read_metrics`.
    """

    name: str
    path: Path
    records: list[dict[str, Any]]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Sorted names of all recorded numbers."""
        found = {
            name
            for record in self.records
            for name, value in record.items()
            if isinstance(value, int | float)
        }
        return tuple(sorted(found - {"step"}))

    def series(self, name: str) -> Series:
        """Collect the values of a metric.

        Parameters
        ----------
        name : str
            Name, such as ``train/loss``.

        Returns
        -------
        (float64 array [n], float64 array [n])
            Unique steps in ascending order, and the last value recorded at each; infinities are
            replaced by NaN. Both are empty if the run lacks the metric.
        """
        points = {
            record["step"]: float(record[name])
            for record in self.records
            if isinstance(record.get(name), int | float)
        }
        steps, values = np.array(sorted(points.items()), np.float64).reshape(-1, 2).T
        return steps, np.where(np.isfinite(values), values, np.nan)

    def objects(self, prefix: str) -> dict[str, list[tuple[int, dict[str, Any]]]]:
        """Collect histograms or texts: (step, object) pairs by name, for names with `prefix`."""
        found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for record in self.records:
            for name, value in record.items():
                if name.startswith(prefix) and isinstance(value, dict):
                    found.setdefault(name, []).append((record["step"], value))
        return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}

    def along(self, steps: NDArray[Any], x: XAxis) -> NDArray[Any]:
        """Convert steps to another x axis, by linear interpolation between records.

        Parameters
        ----------
        steps : float64 array [n]
            Steps.
        x : "steps", "tokens" or "hours"
            Quantity of the axis.

        Returns
        -------
        float64 array [n]
            Tokens trained on, or elapsed hours, at each step.

        Raises
        ------
        NoDataError
            If the run does not record the quantity.
        """
        if x == "steps":
            return steps
        known, values = self.series(_X_METRICS[x])
        if not known.size:
            has = [a for a in get_args(XAxis) if a == "steps" or _X_METRICS[a] in self.names]
            raise NoDataError(
                f"{self.path} has no {_X_METRICS[x]}, which the axis {x} needs: "
                f"choose {' or '.join(has)}"
            )
        # Both quantities are 0 at step 0.
        return np.asarray(np.interp(steps, np.append(0.0, known), np.append(0.0, values)))

    def beside(self, kind: Literal["hyperparameters", "summary"]) -> dict[str, Any]:
        """Read the hyperparameters or the summary beside the metrics file; empty if missing.

        Raises
        ------
        RunDataError
            If the file is damaged.
        """
        path = self.path.with_suffix(f".{kind}.json")
        try:
            size = path.stat().st_size
            if not path.is_file() or size > _MOST_BYTES:
                raise RunDataError(
                    f"{path} is no file of at most {_MOST_BYTES} bytes: move it away"
                )
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise RunDataError(f"{path} is no JSON ({error}): repair it or move it away") from error
        if not isinstance(content, dict):
            raise RunDataError(f"{path} must hold a JSON object: repair it or move it away")
        return content


def open_run(path: str | Path, name: str | None = None) -> RunData:
    """Read the metrics file of a run.

    Parameters
    ----------
    path : path
        A file written by `JsonlTracker`, or a run directory with a ``metrics.jsonl``.
    name : str or None
        Name of the run; None is the name of its directory.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    RunDataError
        If the file is empty or damaged.
    """
    file = _metrics_file(Path(path))
    try:
        records = read_metrics(file)
    except (ValueError, OSError) as error:
        raise RunDataError(str(error)) from error
    if not records:
        raise RunDataError(f"{file} holds no record yet: wait for the first, or give another run")
    return RunData(printable(_run_name(file) if name is None else name), file, records)


def open_runs(paths: Paths, labels: Sequence[str] | None = None) -> list[RunData]:
    """Read several runs and give them distinct names.

    Raises
    ------
    ValueError
        If there is no run, or if the number of labels is not the number of runs; else as
        `open_run`.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    names = _distinct_names(paths) if labels is None else list(labels)
    if not paths or len(names) != len(paths):
        raise ValueError(
            f"labels: got {len(names)} for {len(paths)} runs; expected one for each of at least "
            "one run"
        )
    return [open_run(path, name) for path, name in zip(paths, names, strict=True)]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that lists the known names most similar to an unknown one."""
    known = sorted(known)
    near = nearest_names(name, known, cutoff=0.4)
    if not near:
        near = [each for each in known if name in each][:3] or known[:8]
    return f"nearest: {', '.join(near)}" if near else "there are none"


def _metrics_file(path: Path) -> Path:
    if not path.exists():
        beside = [str(each.parent) for each in path.parent.glob("*/metrics.jsonl")]
        hint = did_you_mean(str(path), beside)
        raise FileNotFoundError(f"{path}: there is no such run directory or metrics file{hint}")
    if not path.is_dir():
        return path
    if not (path / "metrics.jsonl").is_file():
        inside = sorted(each.parent.name for each in path.glob("*/metrics.jsonl"))
        runs = f" (runs in it: {', '.join(inside[:5])})" if inside else ""
        raise FileNotFoundError(f"{path} has no metrics.jsonl: it is no run folder{runs}")
    return path / "metrics.jsonl"


def _run_name(path: Path) -> str:
    return path.resolve().parent.name if path.name == "metrics.jsonl" else path.stem


def _distinct_names(paths: Sequence[str | Path]) -> list[str]:
    """Name runs by their directories, prefixed by parent directories until they are distinct."""
    files = [_metrics_file(Path(path)) for path in paths]
    names = [_run_name(file) for file in files]
    parents = [file.resolve().parents[1 if file.name == "metrics.jsonl" else 0] for file in files]
    for _ in range(max(len(parent.parts) for parent in parents) if files else 0):
        twice = {name for name in names if names.count(name) > 1}
        names = [f"{p.name}/{n}" if n in twice else n for n, p in zip(names, parents, strict=True)]
        parents = [p.parent for p in parents]
    return names
