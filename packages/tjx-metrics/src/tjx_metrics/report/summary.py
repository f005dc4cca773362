"""The figures of a run: how far it came, how well it learned, how fast it was, how it fared."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tjx_metrics.plotting.run_data import RunData

_PARAMETERS = ("parameters", "n_params", "model/parameters", "num_parameters")
# What is logged with the settings and is none.
_ENVIRONMENT = ("versions", "git", "devices", "data", "config_sha256")
_SHARE_OF_WAITING = 0.1  # of the time; with more, data is what the run waits for
_RISE = 0.02  # of the evaluation loss over its lowest; with more, the run has learned by heart


@dataclass(frozen=True)
class Figures:
    """What a run came to; None is not recorded.

    Parameters
    ----------
    steps : int
        The last step.
    tokens : float or None
        Labels trained on.
    hours : float or None
        Hours of running, over resumes.
    first_eval, final_eval, best_eval : float or None
        Evaluation loss, nats a label.
    best_step : int or None
        Step of the best evaluation.
    final_loss : float or None
        Training loss, mean of the last 1/25 of the records, nats a label.
    perplexity, bits_per_byte : float or None
        At the last evaluation.
    tokens_per_sec : float or None
        Median of the second half of the run.
    mfu : float or None
        As share, median of the second half.
    parameters : int or None
        Parameters of the model.
    skipped : int or None
        Steps that were skipped for not being finite.
    recompiles : int or None
        Compilations in the second half of the run, in which there should be none.
    waiting : float or None
        Share of the time in which the run waited for batches.
    """

    steps: int
    tokens: float | None
    hours: float | None
    first_eval: float | None
    final_eval: float | None
    best_eval: float | None
    best_step: int | None
    final_loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    tokens_per_sec: float | None
    mfu: float | None
    parameters: int | None
    skipped: int | None
    recompiles: int | None
    waiting: float | None


def summarize(run: RunData) -> Figures:
    """Compute the figures of a run from its records."""
    steps, evaluation = run.series("eval/loss")
    finite = np.isfinite(evaluation)
    best = int(np.nanargmin(evaluation)) if finite.any() else None
    skipped = _last(run, "train/skipped")
    return Figures(
        steps=max(int(record["step"]) for record in run.records),
        tokens=_last(run, "train/tokens"),
        hours=_last(run, "train/hours"),
        first_eval=float(evaluation[0]) if evaluation.size else None,
        final_eval=float(evaluation[-1]) if evaluation.size else None,
        best_eval=None if best is None else float(evaluation[best]),
        best_step=None if best is None else int(steps[best]),
        final_loss=_final_loss(run),
        perplexity=_last(run, "eval/perplexity"),
        bits_per_byte=_last(run, "eval/bits_per_byte"),
        tokens_per_sec=_steady(run, "train/tokens_per_sec"),
        mfu=_steady(run, "train/mfu"),
        parameters=_parameters(run),
        skipped=None if skipped is None or math.isnan(skipped) else int(skipped),
        recompiles=_recompiles(run),
        waiting=_waiting(run),
    )


def warnings_of(run: RunData, figures: Figures) -> list[str]:
    """Say what a reader of the figures should look into, a sentence each."""
    said = []
    last = run.series("train/loss")[1][-1:]
    if not np.isfinite(last).all():
        said.append("The last training loss is not finite.")
    if figures.final_eval is not None and not math.isfinite(figures.final_eval):
        said.append("The last evaluation loss is not finite.")
    if figures.skipped:
        said.append(f"{figures.skipped} steps were skipped: their loss was not finite.")
    best, final = figures.best_eval, figures.final_eval
    if best is not None and final is not None and final > best * (1 + _RISE):
        said.append(
            f"The evaluation loss rose from {best:.4f} at step {figures.best_step:,} to "
            f"{final:.4f}: the model learns its data by heart, or the run diverges."
        )
    if figures.recompiles:
        said.append(
            f"{figures.recompiles} compilations in the second half of the run: shapes change, "
            "or a function was called for the first time."
        )
    if figures.waiting is not None and figures.waiting > _SHARE_OF_WAITING:
        said.append(f"{figures.waiting:.0%} of the time went into waiting for batches.")
    failed = _last(run, "checkpoint/failed")
    if failed:
        said.append(f"{failed:,.0f} checkpoints could not be saved.")
    planned = config_of(run).get("train.max_steps")
    if isinstance(planned, int) and figures.steps < planned:
        said.append(f"The run stands at step {figures.steps:,} of {planned:,}.")
    return said


def config_of(run: RunData) -> dict[str, Any]:
    """Return the configuration of a run by dotted name, as it was logged."""
    logged = run.beside("hyperparameters")
    config = logged.get("config")
    if isinstance(config, Mapping):
        return flat(config)
    beside = (*_ENVIRONMENT, *_PARAMETERS)
    return flat({name: value for name, value in logged.items() if name not in beside})


def environment_of(run: RunData) -> dict[str, Any]:
    """Return what a run was computed with, by dotted name: versions, git revision, devices."""
    logged = run.beside("hyperparameters")
    return flat({name: logged[name] for name in _ENVIRONMENT if name in logged})


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name the leaves of nested mappings by their path.

    Examples
    --------
    >>> flat({"train": {"seed": 1}, "name": "a"})
    {'train.seed': 1, 'name': 'a'}
    """
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def _last(run: RunData, name: str) -> float | None:
    values = run.series(name)[1]
    return float(values[-1]) if values.size else None


def _final_loss(run: RunData) -> float | None:
    values = run.series("train/loss")[1]
    if not values.size:
        return None
    return float(values[-max(1, values.size // 25) :].mean())


def _steady(run: RunData, name: str) -> float | None:
    values = run.series(name)[1]
    values = values[values.size // 2 :]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else None


def _recompiles(run: RunData) -> int | None:
    """Count compilations in the second half; each resume begins to count anew."""
    values = run.series("compile/count")[1]
    if not values.size:
        return None
    more = np.diff(values[(values.size - 1) // 2 :])
    return int(more[more > 0].sum())


def _waiting(run: RunData) -> float | None:
    sums = {
        name: float(np.nansum(run.series(name)[1]))
        for name in run.names
        if name.startswith("time/")
    }
    total = sum(sums.values())
    return sums.get("time/data_wait", 0.0) / total if total > 0 else None


def _parameters(run: RunData) -> int | None:
    for logged in (run.beside("summary"), run.beside("hyperparameters")):
        for name in _PARAMETERS:
            if isinstance(logged.get(name), int):
                return int(logged[name])
    return None
