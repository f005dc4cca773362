"""Figures of throughput and of the time per phase of runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from tjx_metrics.plotting.curves import PlotOptions, draw_metric, title_of
from tjx_metrics.plotting.run_data import (
    X_LABELS,
    NoDataError,
    RunData,
)
from tjx_metrics.plotting.style import (
    format_axes,
    legend,
    new_figure,
    scale,
)

# Color and label of each phase, from bottom to top. The lightness increases, so that phases are
# distinguishable in grayscale.
PHASE_STYLES = {
    "time/device": ("#08306B", "device: training steps"),
    "time/dispatch": ("#2F6DB3", "dispatch: launching steps"),
    "time/evaluation": ("#D1495B", "evaluation"),
    "time/checkpoint": ("#EDAE49", "checkpoint: waiting for saves"),
    "time/data_wait": ("#A8D8B9", "data_wait: waiting for batches"),
    "time/other": ("#E4E4E4", "other"),
}
_BINS = 60


def throughput_figure(
    runs: Sequence[RunData], options: PlotOptions, title: str | None = None
) -> Figure:
    """Draw tokens per second, and MFU if recorded."""
    metrics = [
        name
        for name in ("train/tokens_per_sec", "train/mfu")
        if any(name in run.names for run in runs)
    ]
    if not metrics:
        raise NoDataError(f"{names_of(runs)}: no record of train/tokens_per_sec or train/mfu")
    figure = new_figure(1.1 + 1.6 * len(metrics) + (0.17 * len(runs) if len(runs) > 1 else 0))
    panels = figure.subplots(len(metrics), 1, squeeze=False, sharex=True)[:, 0]
    for axes, metric in zip(panels, metrics, strict=True):
        draw_metric(axes, runs, metric, options)
        # Both axes start at zero, so that relative differences are visible.
        options.format_axes(
            axes, title="", y="Tokens per second" if metric == metrics[0] else "MFU"
        )
        axes.set_ylim(0, 1.08 * max(axes.get_ylim()[1], 1e-9))
        if metric == "train/mfu":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if axes is not panels[-1]:
            axes.set_xlabel("")
    format_axes(
        panels[0],
        title=title or title_of(runs, "Throughput"),
        y="Tokens per second" if metrics[0] == "train/tokens_per_sec" else "MFU",
        x=X_LABELS[options.x] if len(metrics) == 1 else "",
    )
    figure.align_ylabels(list(panels))
    if len(runs) > 1:
        legend(panels[0], below=True)
    return figure


def time_split(run: RunData) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """Collect the time that a run spent in each phase.

    Returns
    -------
    (float64 array [n], dict of float64 arrays [n])
        Steps of the records, and by phase the seconds since the previous record.

    Raises
    ------
    NoDataError
        If the run has no ``time/...`` records.
    """
    series = {phase: run.series(phase) for phase in PHASE_STYLES}
    steps = np.unique(np.concatenate([steps for steps, _ in series.values()]))
    if not steps.size:
        raise NoDataError(f"{run.path} has no time/device, time/data_wait, ...: nothing to split")
    seconds = {}
    for phase, (at, values) in series.items():
        seconds[phase] = np.zeros(steps.size)
        seconds[phase][np.searchsorted(steps, at)] = np.nan_to_num(values)
    return steps, seconds


def time_split_figure(run: RunData, options: PlotOptions, title: str | None = None) -> Figure:
    """Draw the fraction of time in each phase as stacked areas.

    More than 60 records are merged into 60 bins. The legend shows the fractions of the whole run.
    """
    steps, seconds = time_split(run)
    ends = np.unique(np.linspace(0, steps.size, min(steps.size, _BINS) + 1).astype(int))
    sums = np.array([np.add.reduceat(values, ends[:-1]) for values in seconds.values()])
    total = sums.sum(axis=0)
    shares = np.divide(sums, total, out=np.zeros_like(sums), where=total > 0)
    whole = sums.sum()

    right = run.along(steps[ends[1:] - 1], options.x)
    # The first interval is as long as the second one, or starts at 0.
    left = np.append(max(0.0, right[0] - (right[1] - right[0] if right.size > 1 else right[0])),
                     right[:-1])  # fmt: skip
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    # Filled steps instead of bars: vector formats show thin gaps between bars.
    edges = np.append(left, right[-1])
    base = np.zeros(edges.size)
    for (color, name), share, spent in zip(
        PHASE_STYLES.values(), shares, sums.sum(axis=1), strict=True
    ):
        if not spent:
            continue
        top = base + np.append(share, share[-1])
        label = f"{name} ({spent / whole:.1%})"
        axes.fill_between(edges, base, top, step="post", color=color, label=label, linewidth=0)
        base = top
    format_axes(
        axes, title=title or f"Time: {run.name}", x=X_LABELS[options.x], y="Share of the time"
    )
    axes.grid(visible=False)
    scale(axes, "x", log=False)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1)
    axes.set_xlim(left[0], right[-1])
    legend(axes, below=True, title=f"{_duration(whole)} in all")
    return figure


def names_of(runs: Sequence[RunData]) -> str:
    """List up to three run names for an error message."""
    return ", ".join(run.name for run in runs[:3]) + (", ..." if len(runs) > 3 else "")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
