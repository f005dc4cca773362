"""Plots of a plan: memory per device, and scaling efficiency."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from tjx_metrics.plotting.style import COLORS
from tjx_parallel.planning.step_time import Plan
from tjx_trainer.planning.report import DEVICES, memory_rows, scaled_plan

_GIB = 2**30


def draw_memory(found: Plan, file: Path, *, title: str) -> None:
    """Plot the memory parts of a device against its capacity.

    Parameters
    ----------
    found : Plan
        The plan.
    file : Path
        Output file, .png, .pdf or .svg.
    title : str
        Name of the run.
    """
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.add_subplot()
    start = 0.0
    for (name, size), color in zip(memory_rows(found.step), COLORS, strict=False):
        label = f"{name.partition(':')[0]}, {size / _GIB:.2f} GiB"
        axes.barh(0, size / _GIB, left=start, color=color, label=label, height=0.6)
        start += size / _GIB
    room = found.chip.capacity / _GIB
    axes.axvline(room, color="black", linewidth=1.4, label=f"available: {room:.1f} GiB")
    axes.set_xlim(0, 1.08 * max(start, room))
    axes.set_ylim(-0.6, 0.6)
    axes.set_yticks([])
    axes.set_xlabel("GiB per device")
    result = "fits" if found.fits else "does not fit"
    _dress(axes, f"{title} on {found.step.devices} {found.chip.name}: {result}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, edgecolor="none")
    figure.savefig(file, dpi=200)


def draw_scaling(found: Plan, file: Path, *, title: str) -> None:
    """Plot the predicted efficiency over the number of devices, as a band per scaling mode."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    modes = (("weak scaling", False, COLORS[0], "-"), ("strong scaling", True, COLORS[1], "--"))
    for label, strong, color, line in modes:
        plans = [(n, scaled_plan(found, n, strong=strong)) for n in DEVICES]
        points = [(n, each) for n, each in plans if each is not None]
        counts = [n for n, _ in points]
        low, high = zip(*[each.efficiency for _, each in points], strict=True)
        axes.fill_between(counts, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(counts, low, line, color=color, linewidth=1.6, label=label)
        axes.plot(counts, high, line, color=color, linewidth=0.8)
        missing = [(n, each.efficiency[0]) for n, each in points if not each.fits]
        if missing:
            axes.plot(*zip(*missing, strict=True), "x", color=color, label=f"{label}: no fit")
    axes.axvline(found.step.devices, color="black", linewidth=1, linestyle=":", label="this plan")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(DEVICES)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(f"Devices ({found.chip.name})")
    axes.set_ylabel("Efficiency (no to all communication hidden)", fontsize=9)
    _dress(axes, f"{title}: predicted from {found.step.devices} devices")
    axes.legend(fontsize=9, edgecolor="none", loc="lower left")
    figure.savefig(file, dpi=200)


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
