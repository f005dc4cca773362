"""Telling what a path is: a run, a folder of transformers, or what was given by mistake."""

from pathlib import Path
from typing import NamedTuple

from tjx_eval.errors import EvalError

RUN, TRANSFORMERS = "config.yaml", "config.json"


class Found(NamedTuple):
    """A folder that holds a model; of a run if not of transformers."""

    path: Path
    is_run: bool


def resolve_model(path: Path) -> Found:
    """Tell what kind of model a folder holds.

    Raises
    ------
    RunError
        If it holds none, with the folder that was probably meant.
    """
    if (path / RUN).is_file():
        return Found(path, is_run=True)
    if (path / TRANSFORMERS).is_file():
        return Found(path, is_run=False)
    raise EvalError(f"{path}: {_reason(path)}")


def _reason(path: Path) -> str:
    if not path.exists():
        near = _runs_in(path.parent) or _runs_in(path.parent / "runs")
        return "there is no such folder" + (f"; there are {', '.join(near)}" if near else "")
    if path.is_file():
        around = _enclosing(path.parent)
        return "this is a file: give the folder of the model" + (f", {around}" if around else "")
    if (around := _enclosing(path.parent)) is not None:
        step = f" --step {path.name}" if path.name.isdecimal() else ""
        return f"this is a part of the run {around}: give {around}{step}"
    if runs := _runs_in(path):
        return f"this is a folder of runs: give one of them, such as {', '.join(runs)}"
    return (
        f"neither {RUN} (a run of the trainer) nor {TRANSFORMERS} (a model of transformers) is in "
        "it: give a folder that has one"
    )


def _enclosing(folder: Path) -> Path | None:
    """Return the model around a place, two folders up at most."""
    for around in (folder, folder.parent):
        if (around / RUN).is_file() or (around / TRANSFORMERS).is_file():
            return around
    return None


def _runs_in(folder: Path) -> list[str]:
    return sorted(str(file.parent) for file in folder.glob(f"*/{RUN}"))[-3:]
