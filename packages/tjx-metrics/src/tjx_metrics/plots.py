"""Pictures of runs, good enough for a paper. They touch no global state of matplotlib."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from tjx_metrics.atomic import write_atomically
from tjx_metrics.jsonl import read_metrics

# Okabe and Ito's colours, told apart also by the colour-blind; the first two are a single run's.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FORMATS = ("png", "pdf", "svg")


def plot_loss(
    metrics_jsonl_paths: str | Path | Sequence[str | Path],
    out_path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    window: int | None = None,
) -> None:
    """Draw the training and evaluation loss of one run or of several over their steps.

    Parameters
    ----------
    metrics_jsonl_paths : path or sequence of paths
        Files that `JsonlTracker` wrote, or run folders with a ``metrics.jsonl``.
    out_path : path
        The picture, replaced atomically; ``.png``, ``.pdf`` or ``.svg``.
    labels : sequence of str or None
        Name of each run; None takes the names of their folders.
    title : str or None
        Title; None is the name of a single run, and "Loss" for several.
    window : int or None
        Records over which the training loss is averaged, centred; None is 1/25 of the run, 1 is
        no smoothing.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    ValueError
        When a file has neither ``train/loss`` nor ``eval/loss``, when the number of labels is not
        that of the runs, or for another format.
    """
    out_path = Path(out_path)
    if isinstance(metrics_jsonl_paths, str | Path):
        metrics_jsonl_paths = [metrics_jsonl_paths]
    paths = [_metrics_file(Path(path)) for path in metrics_jsonl_paths]
    names = [_run_name(path) for path in paths] if labels is None else list(labels)
    if out_path.suffix[1:] not in FORMATS:
        raise ValueError(f"out_path={out_path}: must end in one of {', '.join(FORMATS)}")
    if not paths or len(names) != len(paths):
        raise ValueError(
            f"{len(paths)} runs and {len(names)} labels: give at least one run, and "
            "one label for each"
        )

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for index, (path, name) in enumerate(zip(paths, names, strict=True)):
        records = read_metrics(path)
        train, evaluation = _series(records, "train/loss"), _series(records, "eval/loss")
        if not train[0].size and not evaluation[0].size:
            raise ValueError(f"{path} has neither train/loss nor eval/loss: nothing to draw")
        if len(paths) == 1:
            _draw_run(axes, train, evaluation, window, COLORS[:2], None)
        else:
            color = COLORS[index % len(COLORS)]
            _draw_run(axes, train, evaluation, window, (color, color), name)
    legend_title = None if len(paths) == 1 else "light: training, dots: evaluation"
    if title is None:
        title = names[0] if len(paths) == 1 else "Loss"
    _dress(axes, title, legend_title)
    picture = io.BytesIO()
    figure.savefig(picture, format=out_path.suffix[1:], dpi=200)
    write_atomically(out_path, picture.getvalue())


def moving_average(values: NDArray[Any], window: int) -> NDArray[Any]:
    """Average each value with its neighbours on both sides.

    A trailing average would lag behind the evaluation it is drawn with. Near the start the window
    narrows on both sides, so that a steep start is not drawn too low; near the end it loses only
    what is not there, so that the last value is no single noisy one. Values that are not finite are
    left out.

    Parameters
    ----------
    values : float array [n]
        The values.
    window : int
        Number of values in a full window.

    Returns
    -------
    float64 array [n]
        The averages; NaN where a window holds nothing finite.

    Examples
    --------
    >>> moving_average(np.array([9.0, 3.0, 6.0, 0.0, 0.0]), 3).tolist()
    [9.0, 6.0, 3.0, 2.0, 0.0]
    """
    index = np.arange(len(values))
    before = np.minimum(max(window - 1, 0) // 2, index)
    after = np.minimum(before, len(values) - 1 - index)
    finite = np.isfinite(values)

    def windowed_sum(terms: NDArray[Any]) -> NDArray[Any]:
        total = np.concatenate([[0.0], np.cumsum(terms, dtype=np.float64)])
        return np.asarray(total[index + after + 1] - total[index - before])

    count = windowed_sum(finite)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(windowed_sum(np.where(finite, values, 0.0)) / count)


Series = tuple[NDArray[Any], NDArray[Any]]


def _series(records: list[dict[str, Any]], name: str) -> Series:
    """Collect the (steps, values) of a metric, in the order of the steps."""
    points = sorted((r["step"], float(r[name])) for r in records if r.get(name) is not None)
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def _draw_run(
    axes: Axes,
    train: Series,
    evaluation: Series,
    window: int | None,
    colors: tuple[str, ...],
    name: str | None,
) -> None:
    """Draw one run; `name` None is a run alone, whose two curves are told apart by colour."""
    steps, losses = train
    if steps.size:
        width = max(1, steps.size // 25) if window is None else window
        smooth = moving_average(losses, width)
        if name is None:
            label = "training"
            if width > 1:
                label += " (light: not smoothed)"
                axes.plot(steps, losses, color=colors[0], alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth, color=colors[0], linewidth=1.4, label=label)
        else:
            # The name stands at the evaluation where there is one.
            label = "" if evaluation[0].size else name
            axes.plot(steps, smooth, color=colors[0], linewidth=1.4, alpha=0.45, label=label)
    if evaluation[0].size:
        finite = evaluation[1][np.isfinite(evaluation[1])]
        lowest = f"lowest {finite.min():.3f}" if finite.size else "never finite"
        axes.plot(
            *evaluation,
            color=colors[1],
            linewidth=1.4,
            marker="o",
            markersize=3.5,
            label=f"{name or 'evaluation'} ({lowest})",
        )


def _dress(axes: Axes, title: str, legend_title: str | None) -> None:
    # Names of runs may hold dollar signs, which are no mathematics.
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.set_xlabel("Step")
    axes.set_ylabel("Loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(fontsize=9, title=legend_title, title_fontsize=8, edgecolor="none")
    for text in legend.get_texts():
        text.set_parse_math(False)


def _metrics_file(path: Path) -> Path:
    return path / "metrics.jsonl" if path.is_dir() else path


def _run_name(path: Path) -> str:
    return path.resolve().parent.name if path.name == "metrics.jsonl" else path.stem
