"""What a run recorded, as arrays."""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tjx_metrics.trackers.jsonl import read_metrics

_MOST_BYTES = 64 << 20
XAxis = Literal["steps", "tokens", "hours"]
X_LABELS = {"steps": "Step", "tokens": "Tokens", "hours": "Hours"}
_X_METRICS = {"tokens": "train/tokens", "hours": "train/hours"}
Series = tuple[NDArray[Any], NDArray[Any]]
Paths = str | Path | Sequence[str | Path]


class RunDataError(ValueError):
    """A run that cannot be read or has not what was asked for; the text says what to do."""


class NoDataError(RunDataError):
    """A run has no records for a picture."""


@dataclass(frozen=True)
class RunData:
    """The records of a run.

    Parameters
    ----------
    name : str
        What it is called in pictures.
    path : Path
        Its metrics file.
    records : list of dict
        As `read_metrics` gives them.
    """

    name: str
    path: Path
    records: list[dict[str, Any]]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all that is recorded as a number, sorted."""
        found = {
            name
            for record in self.records
            for name, value in record.items()
            if isinstance(value, int | float)
        }
        return tuple(sorted(found - {"step"}))

    def series(self, name: str) -> Series:
        """Collect a metric.

        Parameters
        ----------
        name : str
            Such as ``train/loss``.

        Returns
        -------
        (float64 array [n], float64 array [n])
            Steps in ascending order, each once (the last record counts), and values; infinite
            ones are NaN. Both are empty where the run has no such metric.
        """
        points = {
            record["step"]: float(record[name])
            for record in self.records
            if isinstance(record.get(name), int | float)
        }
        steps, values = np.array(sorted(points.items()), np.float64).reshape(-1, 2).T
        return steps, np.where(np.isfinite(values), values, np.nan)

    def objects(self, prefix: str) -> dict[str, list[tuple[int, dict[str, Any]]]]:
        """Collect histograms or texts: (step, object) of each name that begins with `prefix`."""
        found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for record in self.records:
            for name, value in record.items():
                if name.startswith(prefix) and isinstance(value, dict):
                    found.setdefault(name, []).append((record["step"], value))
        return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}

    def along(self, steps: NDArray[Any], x: XAxis) -> NDArray[Any]:
        """Turn steps into places on another axis, by the records nearest to them.

        Parameters
        ----------
        steps : float64 array [n]
            Steps.
        x : "steps", "tokens" or "hours"
            The axis.

        Returns
        -------
        float64 array [n]
            Tokens trained on, or hours that the run took, until each step.

        Raises
        ------
        NoDataError
            When the run does not record what the axis needs.
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
        # A run begins with nothing done.
        return np.asarray(np.interp(steps, np.append(0.0, known), np.append(0.0, values)))

    def beside(self, kind: Literal["hyperparameters", "summary"]) -> dict[str, Any]:
        """Read the settings or the summary of the run; empty where there are none.

        Raises
        ------
        RunError
            When the file is damaged.
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
            raise RunDataError(f"{path} is no JSON ({error}): mend it or move it away") from error
        if not isinstance(content, dict):
            raise RunDataError(f"{path} must hold a JSON object: mend it or move it away")
        return content


def open_run(path: str | Path, name: str | None = None) -> RunData:
    """Read a run.

    Parameters
    ----------
    path : path
        A file that `JsonlTracker` wrote, or a run folder with a ``metrics.jsonl``.
    name : str or None
        What to call it; None is the name of its folder.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    RunError
        When the file is empty or damaged.
    """
    file = _metrics_file(Path(path))
    try:
        records = read_metrics(file)
    except (ValueError, OSError) as error:
        raise RunDataError(str(error)) from error
    if not records:
        raise RunDataError(f"{file} holds no record yet: wait for the first, or give another run")
    return RunData(_run_name(file) if name is None else name, file, records)


def open_runs(paths: Paths, labels: Sequence[str] | None = None) -> list[RunData]:
    """Read runs, each with a name of its own.

    Raises
    ------
    ValueError
        When there is no run, or not a label for each; else as `open_run`.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    names = _distinct_names(paths) if labels is None else list(labels)
    if not paths or len(names) != len(paths):
        raise ValueError(
            f"{len(paths)} runs and {len(names)} labels: give at least one run, and "
            "one label for each"
        )
    return [open_run(path, name) for path, name in zip(paths, names, strict=True)]


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which names are nearest to one that there is not."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if not near:
        near = [each for each in known if name in each][:3] or known[:8]
    return f"nearest: {', '.join(near)}" if near else "there are none"


def _metrics_file(path: Path) -> Path:
    if not path.exists():
        beside = [str(each.parent) for each in path.parent.glob("*/metrics.jsonl")]
        near = difflib.get_close_matches(str(path), beside, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(f"{path}: there is no such run folder or metrics file{hint}")
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
    """Name runs by their folders, with as many folders above as tell them apart."""
    files = [_metrics_file(Path(path)) for path in paths]
    names = [_run_name(file) for file in files]
    parents = [file.resolve().parents[1 if file.name == "metrics.jsonl" else 0] for file in files]
    for _ in range(max(len(parent.parts) for parent in parents) if files else 0):
        twice = {name for name in names if names.count(name) > 1}
        names = [f"{p.name}/{n}" if n in twice else n for n, p in zip(names, parents, strict=True)]
        parents = [p.parent for p in parents]
    return names
