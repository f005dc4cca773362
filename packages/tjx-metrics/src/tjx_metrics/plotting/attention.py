"""Pictures of attention: where each head looks, and how far."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tjx_metrics.plotting.attention_distance import check_weights, mean_distance
from tjx_metrics.plotting.style import (
    INK,
    LABEL,
    TITLE,
    check_output_path,
    new_figure,
    save,
    shown,
)

_TOKEN_SIZE = 6  # points of a token's label
_TOKEN_ROOM = 0.105  # inches of a row with a label
_MOST_LABELS = 40  # tokens; with more, positions stand at the axes
_COLORS = "Blues"  # white is nothing; it reads in grey too


def plot_attention_maps(
    weights: NDArray[Any],
    tokens: Sequence[str] | None,
    out_path: str | Path,
    *,
    title: str | None = None,
) -> None:
    """Draw the attention of each head of each layer: queries down, keys to the right.

    All maps share one scale of colours. It is the square root of the weight that is drawn, so that
    small weights are seen too.

    Parameters
    ----------
    weights : float array [layers, heads, queries, keys]
        Attention after the softmax.
    tokens : sequence of str or None
        The text of each key; the last ones are the queries. None, or more than 40, gives positions.
    out_path : path
        The picture, replaced atomically; ``.png``, ``.pdf`` or ``.svg``.
    title : str or None
        Title; None is "Attention".

    Raises
    ------
    ValueError
        When `weights` has other axes or is no attention, when the number of tokens is not that of
        the keys, or for another format.
    """
    out_path = check_output_path(out_path)
    save(attention_maps_figure(weights, tokens, title or "Attention"), out_path)


def attention_maps_figure(
    weights: NDArray[Any], tokens: Sequence[str] | None, title: str
) -> Figure:
    """Draw what `plot_attention_maps` writes."""
    weights = check_weights(weights)
    layers, heads, queries, keys = weights.shape
    if tokens is not None and len(tokens) != keys:
        raise ValueError(f"{len(tokens)} tokens for {keys} keys: give one text for each key")
    words = None if tokens is None or keys > _MOST_LABELS else [shown(text) for text in tokens]
    # A map with labels must have room for them; without, twelve by twelve still fit a page.
    small = 0.55 if heads > 8 else 1.0
    width = small if words is None else max(small, _TOKEN_ROOM * keys)
    height = max(width * queries / keys, 0.35)
    figure = new_figure(height=layers * height + 1.1, width=max(heads * width + 1.2, 3.3))
    figure.suptitle(shown(title), fontsize=TITLE, color=INK, parse_math=False)
    grid = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    image = None
    for layer in range(layers):
        for head in range(heads):
            axes = grid[layer, head]
            image = axes.imshow(
                np.sqrt(weights[layer, head]),
                cmap=_COLORS, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest",
            )  # fmt: skip
            _label_map(axes, words, queries, keys)
            if layer == 0:
                axes.set_title(f"head {head}" if head == 0 else str(head), fontsize=7, color=INK)
        grid[layer, 0].set_ylabel(f"layer {layer}", fontsize=7, color=INK)
    figure.supxlabel("Key", fontsize=LABEL, color=INK)
    figure.supylabel("Query", fontsize=LABEL, color=INK)
    assert image is not None
    _color_bar(figure, image, grid, "Weight")
    return figure


def _label_map(axes: Axes, words: Sequence[str] | None, queries: int, keys: int) -> None:
    axes.tick_params(labelsize=_TOKEN_SIZE, length=2, width=0.5, colors=INK)
    axes.spines[:].set_linewidth(0.5)
    axes.spines[:].set_color(INK)
    if words is None:
        axes.set_xticks(sorted({0, keys - 1}))
        axes.set_yticks(
            sorted({0, queries - 1}),
            labels=[str(place) for place in sorted({keys - queries, keys - 1})],
        )
        return
    axes.set_xticks(range(keys), labels=words, rotation=90)
    axes.set_yticks(range(queries), labels=words[keys - queries :])
    for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        text.set_parse_math(False)


def _color_bar(figure: Figure, image: Any, grid: NDArray[Any], label: str) -> None:
    """Draw the scale of colours, whose numbers are squares of what was drawn."""
    marks = [0.0, 0.1, 0.25, 0.5, 1.0]
    bar = figure.colorbar(image, ax=grid, fraction=0.05, pad=0.02, aspect=30)
    bar.set_ticks([float(np.sqrt(mark)) for mark in marks], labels=[f"{m:g}" for m in marks])
    bar.set_label(label, fontsize=LABEL, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)


def plot_attention_distances(
    shares: NDArray[Any], out_path: str | Path, *, title: str | None = None
) -> None:
    """Draw how far each head looks: a histogram of distances for each, and the mean of each layer.

    Distances are put together by powers of two: 0, 1, 2 to 3, 4 to 7, and so on. The number at the
    right of a head is its mean distance in tokens.

    Parameters
    ----------
    shares : float array [layers, heads, distances]
        As `attention_distances` gives them.
    out_path : path
        The picture, replaced atomically; ``.png``, ``.pdf`` or ``.svg``.
    title : str or None
        Title; None is "Distance of attention".

    Raises
    ------
    ValueError
        When `shares` has other axes or holds what is no share, or for another format.
    """
    out_path = check_output_path(out_path)
    save(attention_distances_figure(shares, title or "Distance of attention"), out_path)


def attention_distances_figure(shares: NDArray[Any], title: str) -> Figure:
    """Draw what `plot_attention_distances` writes."""
    shares = np.asarray(shares, np.float64)
    if shares.ndim != 3 or not shares.size:
        raise ValueError(
            f"shares of shape {shares.shape}: must be [layers, heads, distances], none empty"
        )
    if not np.isfinite(shares).all() or shares.min() < 0 or shares.max() > 1 + 1e-6:
        raise ValueError("shares: must be between 0 and 1, as attention_distances gives them")
    layers, heads, _ = shares.shape
    binned, labels = by_powers_of_two(shares)
    columns = min(layers, 3)
    rows = -(-layers // columns)
    height = 0.55 + max(0.13 * heads, 0.5)
    figure = new_figure(height=rows * height + 0.9, width=max(1.0 + 2.0 * columns, 3.3))
    figure.suptitle(shown(title), fontsize=TITLE, color=INK, parse_math=False)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    image = None
    means = mean_distance(shares)
    for layer, axes in enumerate(grid.flat):
        if layer >= layers:
            axes.set_axis_off()
            continue
        image = axes.imshow(
            np.sqrt(binned[layer]), cmap=_COLORS, vmin=0.0, vmax=1.0, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        axes.set_title(f"layer {layer}: mean {means[layer].mean():.1f}", fontsize=8, color=INK)
        axes.tick_params(labelsize=_TOKEN_SIZE, length=2, width=0.5, colors=INK)
        axes.set_yticks(range(heads))
        axes.set_xticks(range(len(labels)), labels=labels, rotation=90)
        axes.tick_params(axis="x", labelbottom=layer + columns >= layers)
        at_right = axes.secondary_yaxis("right")
        at_right.set_yticks(range(heads), labels=[f"{mean:.1f}" for mean in means[layer]])
        at_right.tick_params(labelsize=_TOKEN_SIZE, length=0, colors=INK)
        at_right.spines["right"].set_visible(False)
    figure.supxlabel("Tokens from query to key (at the right: mean)", fontsize=LABEL, color=INK)
    figure.supylabel("Head", fontsize=LABEL, color=INK)
    assert image is not None
    _color_bar(figure, image, grid, "Share of attention")
    return figure


def by_powers_of_two(shares: NDArray[Any]) -> tuple[NDArray[np.float64], list[str]]:
    r"""Add shares of distances up in bins 0, 1, 2-3, 4-7 and so on.

    Parameters
    ----------
    shares : float array [..., distances]
        A share of each distance.

    Returns
    -------
    (float64 array [..., bins], list of str)
        The sums, and the distances that each holds.

    Examples
    --------
    >>> by_powers_of_two(np.array([0.1, 0.2, 0.3, 0.4]))[1] == ['0', '1', '2\u20133']
    True
    """
    longest = shares.shape[-1] - 1
    starts = [0, *(2**n for n in range(longest.bit_length()))]
    ends = [*(start - 1 for start in starts[1:]), longest]
    labels = [str(a) if a == b else f"{a}\u2013{b}" for a, b in zip(starts, ends, strict=True)]
    return np.add.reduceat(shares.astype(np.float64), starts, axis=-1), labels
