"""Scatter plot of the loss of each document under two models."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from tjx_eval.scoring.comparison import Comparison

_SMALLEST, _LARGEST = 6.0, 90.0  # area of a marker, points squared
_BLUE, _INK = "#0072B2", "#222222"


def plot_comparison(comparison: Comparison, names: tuple[str, str], path: Path) -> None:
    """Plot one marker per document; its area grows with the size of the document.

    Parameters
    ----------
    comparison : Comparison
        Losses of both models.
    names : tuple of str
        Names of the models.
    path : Path
        Output file: ``.png``, ``.pdf`` or ``.svg``.
    """
    scored = comparison.sizes > 0
    sizes = comparison.sizes[scored]
    a, b = (losses[scored] / sizes for losses in (comparison.losses_a, comparison.losses_b))
    figure = Figure(figsize=(4.8, 4.8), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    low, high = min(a.min(), b.min()), max(a.max(), b.max())
    margin = 0.05 * (high - low) or 0.1
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=_INK, linewidth=0.8, linestyle="--", zorder=1)
    axes.scatter(
        a, b, s=_SMALLEST + (_LARGEST - _SMALLEST) * sizes / sizes.max(), color=_BLUE, alpha=0.45,
        edgecolors="none", zorder=2,
    )  # fmt: skip
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.set_xlabel(f"A: {names[0]} ({comparison.unit})", fontsize=9, parse_math=False)
    axes.set_ylabel(f"B: {names[1]} ({comparison.unit})", fontsize=9, parse_math=False)
    better = int((b < a).sum())
    axes.set_title(
        f"Loss of {len(a):,} documents; B is better on {better:,} (below the line)", fontsize=10
    )
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=200)
    path.write_bytes(content.getvalue())
