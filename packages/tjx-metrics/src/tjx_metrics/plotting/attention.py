"""Plot attention maps and attention distances of each head."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tjx_metrics.plotting.style import (
    INK,
    LABEL,
    TITLE,
    check_output_path,
    new_figure,
    printable,
    save,
)

_TOKEN_SIZE = 6  # points, font size of token labels
_TOKEN_ROOM = 0.105  # inches per token label
_MOST_LABELS = 40  # with more tokens, the axes show positions
_COLORS = "Blues"  # 0 is white; legible in grayscale


def plot_attention_maps(
    weights: NDArray[Any],
    tokens: Sequence[str] | None,
    out_path: str | Path,
    *,
    title: str | None = None,
) -> None:
    """Plot the attention matrix of each head of each layer: queries down, keys to the right.

    All maps share one color scale, which is the square root of the weight so that small weights are
    visible.

    Parameters
    ----------
    weights : float array [layers, heads, queries, keys]
        Attention weights after the softmax.
    tokens : sequence of str or None
        Text of each key; the queries are the last ones. None, or more than 40, shows positions.
    out_path : path
        Output file, replaced atomically; ``.png``, ``.pdf`` or ``.svg``.
    title : str or None
        Title; None is "Attention".

    Raises
    ------
    ValueError
        If `weights` has a wrong shape or invalid values, if the number of tokens is not the number
        of keys, or if the file format is unknown.
    """
    out_path = check_output_path(out_path)
    save(attention_maps_figure(weights, tokens, title or "Attention"), out_path)


def attention_maps_figure(
    weights: NDArray[Any], tokens: Sequence[str] | None, title: str
) -> Figure:
    """Return the figure of `plot_attention_maps`."""
    weights = _check_weights(weights)
    layers, heads, queries, keys = weights.shape
    if tokens is not None and len(tokens) != keys:
        raise ValueError(f"tokens: got {len(tokens)}; expected {keys}, a text for each key")
    words = None if tokens is None or keys > _MOST_LABELS else [printable(text) for text in tokens]
    # Labels need room; without them, a grid of twelve by twelve maps still fits on a page.
    small = 0.55 if heads > 8 else 1.0
    width = small if words is None else max(small, _TOKEN_ROOM * keys)
    height = max(width * queries / keys, 0.35)
    figure = new_figure(height=layers * height + 1.1, width=max(heads * width + 1.2, 3.3))
    figure.suptitle(printable(title), fontsize=TITLE, color=INK, parse_math=False)
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
            labels=[str(position) for position in sorted({keys - queries, keys - 1})],
        )
        return
    axes.set_xticks(range(keys), labels=words, rotation=90)
    axes.set_yticks(range(queries), labels=words[keys - queries :])
    for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        text.set_parse_math(False)


def _color_bar(figure: Figure, image: Any, grid: NDArray[Any], label: str) -> None:
    """Draw the color bar, labeled with the squares of the plotted values."""
    ticks = [0.0, 0.1, 0.25, 0.5, 1.0]
    bar = figure.colorbar(image, ax=grid, fraction=0.05, pad=0.02, aspect=30)
    bar.set_ticks([float(np.sqrt(tick)) for tick in ticks], labels=[f"{t:g}" for t in ticks])
    bar.set_label(label, fontsize=LABEL, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)


def attention_distances(weights: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the fraction of attention at each distance between query and key.

    Parameters
    ----------
    weights : float array [layers, heads, queries, keys]
        Attention weights after the softmax. With fewer queries than keys, the queries are the last
        positions, as with a KV cache. Rows of zeros (padding) are ignored.

    Returns
    -------
    float64 array [layers, heads, keys]
        Fractions at distances 0, 1, ..., keys - 1, before or after the query. They sum to 1 for
        each head, or are all 0 if all weights of the head are 0.

    Raises
    ------
    ValueError
        If `weights` has a wrong shape, more queries than keys, or a negative or non-finite value.

    Examples
    --------
    >>> weights = np.array([[[[1.0, 0.0], [0.5, 0.5]]]])
    >>> attention_distances(weights).tolist()
    [[[0.75, 0.25]]]
    """
    weights = _check_weights(weights)
    layers, heads, queries, keys = weights.shape
    positions = np.arange(queries)[:, None] + keys - queries
    distance = np.abs(positions - np.arange(keys)[None, :]).ravel()
    shares = np.empty((layers, heads, keys))
    for layer, head in np.ndindex(layers, heads):
        flat = weights[layer, head].ravel().astype(np.float64)
        shares[layer, head] = np.bincount(distance, flat, minlength=keys)
    total = shares.sum(axis=-1, keepdims=True)
    return np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)


def _check_weights(weights: NDArray[Any]) -> NDArray[Any]:
    weights = np.asarray(weights)
    if weights.ndim != 4 or not weights.size or weights.shape[2] > weights.shape[3]:
        raise ValueError(
            f"weights: got shape {weights.shape}; expected [layers, heads, queries, keys], none "
            "empty, with no more queries than keys"
        )
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("weights: got a negative or non-finite value; expected softmax weights")
    return weights


def mean_distance(shares: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean distance in tokens, float64 [...], of shares [..., distances]."""
    return np.asarray(shares @ np.arange(shares.shape[-1], dtype=np.float64))


def plot_attention_distances(
    shares: NDArray[Any], out_path: str | Path, *, title: str | None = None
) -> None:
    """Plot a histogram of attention distances for each head, with the mean of each layer.

    Distances are binned by powers of two: 0, 1, 2 to 3, 4 to 7, and so on. The number at the right
    of each head is its mean distance in tokens.

    Parameters
    ----------
    shares : float array [layers, heads, distances]
        Result of `attention_distances`.
    out_path : path
        Output file, replaced atomically; ``.png``, ``.pdf`` or ``.svg``.
    title : str or None
        Title; None is "Attention distance".

    Raises
    ------
    ValueError
        If `shares` has a wrong shape or values outside [0, 1], or if the file format is unknown.
    """
    out_path = check_output_path(out_path)
    save(attention_distances_figure(shares, title or "Attention distance"), out_path)


def attention_distances_figure(shares: NDArray[Any], title: str) -> Figure:
    """Return the figure of `plot_attention_distances`."""
    shares = np.asarray(shares, np.float64)
    if shares.ndim != 3 or not shares.size:
        raise ValueError(
            f"shares: got shape {shares.shape}; expected [layers, heads, distances], none empty"
        )
    if not np.isfinite(shares).all() or shares.min() < 0 or shares.max() > 1 + 1e-6:
        raise ValueError("shares: got values outside of [0, 1]; expected attention_distances")
    layers, heads, _ = shares.shape
    binned, labels = by_powers_of_two(shares)
    columns = min(layers, 3)
    rows = -(-layers // columns)
    height = 0.55 + max(0.13 * heads, 0.5)
    figure = new_figure(height=rows * height + 0.9, width=max(1.0 + 2.0 * columns, 3.3))
    figure.suptitle(printable(title), fontsize=TITLE, color=INK, parse_math=False)
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
    r"""Sum shares of distances in the bins 0, 1, 2-3, 4-7 and so on.

    Parameters
    ----------
    shares : float array [..., distances]
        Share of each distance.

    Returns
    -------
    (float64 array [..., bins], list of str)
        The sums, and the label of each bin.

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
