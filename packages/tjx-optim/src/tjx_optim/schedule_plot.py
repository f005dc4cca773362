"""A picture of learning-rate schedules, good enough for a paper."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tjx_optim.schedule_config import ScheduleConfig
from tjx_optim.schedules import learning_rates

FORMATS = ("png", "pdf", "svg")
_POINTS = 4000  # of a curve, at most: more than a picture has columns, so jumps are upright

# Okabe and Ito's colours, told apart also by the colour-blind.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Curves that share a warm-up and a peak lie on each other: the upper ones are dashed and thinner.
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_WIDTHS = (2.6, 2.4, 2.2, 2.0, 1.8, 1.6, 1.4)


def plot_schedules(
    schedules: Mapping[str, ScheduleConfig],
    file: str | Path,
    *,
    learning_rate: float,
    max_steps: int,
) -> None:
    """Draw the learning rate of one schedule or several over the steps of a run.

    Parameters
    ----------
    schedules : mapping of str to ScheduleConfig
        The schedules by the names that the legend gives them, at most 7.
    file : str or Path
        The picture; its suffix chooses the format (.png, .pdf, .svg). Missing folders are made.
    learning_rate : float
        Peak learning rate; with 1.0 the axis is labelled as fractions of the peak.
    max_steps : int
        Steps of the run.

    Raises
    ------
    ValueError
        If the ``plot`` extra is not installed, for another format or another number of schedules,
        or for a schedule that does not fit into the run.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError as error:
        raise ValueError("a picture needs the extra: pip install 'tjx-optim[plot]'") from error
    file = Path(file)
    if file.suffix[1:] not in FORMATS:
        raise ValueError(f"picture={file}: must end in one of {', '.join(FORMATS)}; rename it")
    if not 1 <= len(schedules) <= len(_COLORS):
        raise ValueError(f"{len(schedules)} schedules: a picture shows 1 to {len(_COLORS)}")
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    points = min(max_steps, _POINTS)
    steps = np.linspace(0, max_steps - 1, points).round().astype(np.int64)
    looks = zip(_COLORS, _DASHES, _WIDTHS, strict=True)
    for (label, config), (color, dash, width) in zip(schedules.items(), looks, strict=False):
        rates = learning_rates(
            config, learning_rate=learning_rate, max_steps=max_steps, steps=steps
        )
        axes.plot(steps, rates, color=color, linestyle=dash, linewidth=width, label=label)
    axes.set_xlabel("Step (updates of the parameters)")
    axes.set_ylabel("Learning rate" + (" (fraction of the peak)" if learning_rate == 1 else ""))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.margins(x=0.01)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the axes: inside them there is no place that every schedule leaves free.
    legend = figure.legend(loc="outside right upper", fontsize=9, edgecolor="none", handlelength=3)
    for text in legend.get_texts():
        text.set_parse_math(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=200)
