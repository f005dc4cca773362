"""Recognize model directories: runs of the trainer and Hugging Face Transformers models."""

from pathlib import Path
from typing import NamedTuple

from tjx_eval.errors import EvalError

RUN, TRANSFORMERS = "config.yaml", "config.json"


class ResolvedModel(NamedTuple):
    """A model directory: a run of the trainer, or else a Transformers model."""

    path: Path
    is_run: bool


def resolve_model(path: Path) -> ResolvedModel:
    """Return the kind of a model directory.

    Raises
    ------
    EvalError
        If it is none; the message suggests the directory that was probably meant.
    """
    if (path / RUN).is_file():
        return ResolvedModel(path, is_run=True)
    if (path / TRANSFORMERS).is_file():
        return ResolvedModel(path, is_run=False)
    raise EvalError(f"{path}: {_reason(path)}")


def _reason(path: Path) -> str:
    if not path.exists():
        runs = _runs_in(path.parent) or _runs_in(path.parent / "runs")
        return "no such directory" + (f"; there are {', '.join(runs)}" if runs else "")
    model = _enclosing_model(path.parent)
    if path.is_file():
        return "got a file; expected a model directory" + (f"; give {model}" if model else "")
    if model is not None:
        step = f" --step {path.name}" if path.name.isdecimal() else ""
        return f"got a part of the model directory {model}; give {model}{step}"
    if runs := _runs_in(path):
        return f"got a directory of runs; give one of them, such as {', '.join(runs)}"
    return (
        f"found neither {RUN} (a run of the trainer) nor {TRANSFORMERS} (a Transformers model) in "
        "this directory; give one that has either"
    )


def _enclosing_model(folder: Path) -> Path | None:
    """Return the nearest model directory among a folder and its parent."""
    for candidate in (folder, folder.parent):
        if (candidate / RUN).is_file() or (candidate / TRANSFORMERS).is_file():
            return candidate
    return None


def _runs_in(folder: Path) -> list[str]:
    return sorted(str(file.parent) for file in folder.glob(f"*/{RUN}"))[-3:]
