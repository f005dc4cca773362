"""Summary of a run: duration, losses, throughput and warnings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tjx_metrics.plotting.run_data import RunData

_PARAMETERS = ("parameters", "n_params", "model/parameters", "num_parameters")
# Logged with the hyperparameters, but not part of the config.
_ENVIRONMENT = ("versions", "git", "devices", "data", "config_sha256")
_SHARE_OF_WAITING = 0.1  # fraction of time above which waiting for data is reported
_RISE = 0.02  # relative rise of the evaluation loss above its minimum that is reported


@dataclass(frozen=True)
class RunSummary:
    """Key figures of a run; None if not recorded.

    Attributes
    ----------
    steps : int
        Last step.
    tokens : float or None
        Labels trained on.
    hours : float or None
        Elapsed hours, over all resumes.
    first_eval, final_eval, best_eval : float or None
        Evaluation loss, nats per label.
    best_step : int or None
        Step of the best evaluation.
    final_loss : float or None
        Mean training loss of the last 1/25 of the records, nats per label.
    perplexity, bits_per_byte : float or None
        Of the last evaluation.
    tokens_per_sec, mfu : float or None
        Medians over the second half of the run; MFU in [0, 1].
    parameters : int or None
        Number of model parameters.
    skipped : int or None
        Steps skipped because of non-finite values.
    recompiles : int or None
        Compilations in the second half of the run; expected to be 0.
    waiting : float or None
        Fraction of time spent waiting for batches.
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


def summarize(run: RunData) -> RunSummary:
    """Compute the summary of a run from its records."""
    steps, evaluation = run.series("eval/loss")
    finite = np.isfinite(evaluation)
    best = int(np.nanargmin(evaluation)) if finite.any() else None
    skipped = _last(run, "train/skipped")
    return RunSummary(
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
        tokens_per_sec=_second_half_median(run, "train/tokens_per_sec"),
        mfu=_second_half_median(run, "train/mfu"),
        parameters=_parameters(run),
        skipped=None if skipped is None or math.isnan(skipped) else int(skipped),
        recompiles=_recompiles(run),
        waiting=_waiting(run),
    )


def warnings_of(run: RunData, summary: RunSummary) -> list[str]:
    """Return one sentence for each aspect of a run that deserves attention."""
    found = []
    last = run.series("train/loss")[1][-1:]
    if not np.isfinite(last).all():
        found.append("The last training loss is not finite.")
    if summary.final_eval is not None and not math.isfinite(summary.final_eval):
        found.append("The last evaluation loss is not finite.")
    if summary.skipped:
        found.append(f"{summary.skipped} steps were skipped: their loss was not finite.")
    best, final = summary.best_eval, summary.final_eval
    if best is not None and final is not None and final > best * (1 + _RISE):
        found.append(
            f"The evaluation loss rose from {best:.4f} at step {summary.best_step:,} to "
            f"{final:.4f}: the model overfits, or the run diverges."
        )
    if summary.recompiles:
        found.append(
            f"{summary.recompiles} compilations in the second half of the run: shapes change, "
            "or a function was called for the first time."
        )
    if summary.waiting is not None and summary.waiting > _SHARE_OF_WAITING:
        found.append(f"{summary.waiting:.0%} of the time was spent waiting for batches.")
    failed = _last(run, "checkpoint/failed")
    if failed:
        found.append(f"{failed:,.0f} checkpoints could not be saved.")
    planned = config_of(run).get("train.max_steps")
    if isinstance(planned, int) and summary.steps < planned:
        found.append(f"The run is at step {summary.steps:,} of {planned:,}.")
    return found


def config_of(run: RunData) -> dict[str, Any]:
    """Return the logged config of a run by dotted name."""
    logged = run.beside("hyperparameters")
    config = logged.get("config")
    if isinstance(config, Mapping):
        return flat(config)
    other = (*_ENVIRONMENT, *_PARAMETERS)
    return flat({name: value for name, value in logged.items() if name not in other})


def environment_of(run: RunData) -> dict[str, Any]:
    """Return the logged environment by dotted name: versions, git revision, devices."""
    logged = run.beside("hyperparameters")
    return flat({name: logged[name] for name in _ENVIRONMENT if name in logged})


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted names.

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


def _second_half_median(run: RunData, name: str) -> float | None:
    values = run.series(name)[1]
    values = values[values.size // 2 :]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else None


def _recompiles(run: RunData) -> int | None:
    """Count compilations in the second half; the counter restarts with each resume."""
    values = run.series("compile/count")[1]
    if not values.size:
        return None
    increments = np.diff(values[(values.size - 1) // 2 :])
    return int(increments[increments > 0].sum())


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
