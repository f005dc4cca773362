"""Learning rates of many steps, and plots of schedules."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tjx_optim.schedule_config import ScheduleConfig
from tjx_optim.schedules import make_schedule

FORMATS = ("png", "pdf", "svg")
_MAX_POINTS = 4000  # of a curve; more than the plot has columns, so jumps are vertical

# Okabe and Ito's colors, distinguishable with color blindness.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Curves with the same warm-up and peak overlap, so later ones are dashed and thinner.
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_WIDTHS = (2.6, 2.4, 2.2, 2.0, 1.8, 1.6, 1.4)


def plot_schedules(
    schedules: Mapping[str, ScheduleConfig],
    file: str | Path,
    *,
    learning_rate: float,
    max_steps: int,
) -> None:
    """Plot the learning rates of one or more schedules over the steps of a run.

    Parameters
    ----------
    schedules : mapping of str to ScheduleConfig
        Schedules by legend label, at most 7.
    file : str or Path
        Output file; the suffix selects the format (.png, .pdf, .svg). Missing folders are created.
    learning_rate : float
        Peak learning rate; with 1.0 the axis is labelled as fractions of the peak.
    max_steps : int
        Number of steps of the run.

    Raises
    ------
    ValueError
        If the ``plot`` extra is not installed, the format or the number of schedules is not
        supported, or the phases of a schedule overlap in this run.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError as error:
        raise ValueError("picture: plots need the extra: pip install 'tjx-optim[plot]'") from error
    file = Path(file)
    if file.suffix[1:] not in FORMATS:
        raise ValueError(f"picture: got {file}; expected a name ending in .{', .'.join(FORMATS)}")
    if not 1 <= len(schedules) <= len(_COLORS):
        raise ValueError(f"schedules: got {len(schedules)}; expected 1 to {len(_COLORS)}")
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    points = min(max_steps, _MAX_POINTS)
    steps = np.linspace(0, max_steps - 1, points).round().astype(np.int64)
    styles = zip(_COLORS, _DASHES, _WIDTHS, strict=True)
    for (label, config), (color, dash, width) in zip(schedules.items(), styles, strict=False):
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
    # Outside of the axes, where it covers no curve.
    legend = figure.legend(loc="outside right upper", fontsize=9, edgecolor="none", handlelength=3)
    for text in legend.get_texts():
        text.set_parse_math(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=200)


def learning_rates(
    config: ScheduleConfig,
    *,
    learning_rate: float,
    max_steps: int,
    steps: npt.NDArray[np.integer] | None = None,
) -> npt.NDArray[np.float32]:
    """Compute the learning rates of many steps, for tables and plots.

    Parameters
    ----------
    config, learning_rate, max_steps
        As for `make_schedule`.
    steps : integer array [n] or None
        The steps, below 2**31; None: all steps of the run, 0 to ``max_steps - 1``.

    Returns
    -------
    float32 array [n]
        The rate of each step, bit for bit as in training.

    Examples
    --------
    >>> config = ScheduleConfig(name="piecewise", boundaries=(0.5, 0.75), factors=(0.5, 0.25))
    >>> print(learning_rates(config, learning_rate=4.0, max_steps=8))
    [4. 4. 4. 4. 2. 2. 1. 1.]
    """
    schedule = make_schedule(config, learning_rate=learning_rate, max_steps=max_steps)
    selected = np.arange(max_steps) if steps is None else steps
    rates = jax.jit(jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32)))
    return np.asarray(jax.device_get(rates(jax.device_put(selected.astype(np.int32)))))
