"""A picture of two models: the loss of each document under both."""

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from tjx_eval.scoring.comparison import Comparison

_SMALLEST, _LARGEST = 6.0, 90.0  # area of a dot, points squared
_BLUE, _INK = "#0072B2", "#222222"


def draw_comparison(found: Comparison, names: tuple[str, str], path: Path) -> None:
    """Draw a dot for each document, its area growing with the document's size.

    Parameters
    ----------
    found : Comparison
        What was measured.
    names : tuple of str
        Of the models.
    path : Path
        The picture: ``.png``, ``.pdf`` or ``.svg``.
    """
    sizes = np.maximum(found.sizes, 1)
    a, b = (losses[found.sizes > 0] / sizes[found.sizes > 0] for losses in (
        found.losses_a, found.losses_b))  # fmt: skip
    share = sizes[found.sizes > 0] / sizes.max()
    figure = Figure(figsize=(4.8, 4.8), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    low, high = min(a.min(), b.min()), max(a.max(), b.max())
    margin = 0.05 * (high - low) or 0.1
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=_INK, linewidth=0.8, linestyle="--", zorder=1)
    axes.scatter(
        a, b, s=_SMALLEST + (_LARGEST - _SMALLEST) * share, color=_BLUE, alpha=0.45,
        edgecolors="none", zorder=2,
    )  # fmt: skip
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.set_xlabel(f"A: {names[0]} ({found.unit})", fontsize=9, parse_math=False)
    axes.set_ylabel(f"B: {names[1]} ({found.unit})", fontsize=9, parse_math=False)
    better = int((b < a).sum())
    axes.set_title(
        f"Loss of {len(a):,} documents; B is better on {better:,} (below the line)", fontsize=10
    )
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=200)
    path.write_bytes(picture.getvalue())
