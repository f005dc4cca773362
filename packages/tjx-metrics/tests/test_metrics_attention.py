"""Attention plots: distances equal a slow loop, and figures have the expected elements."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tjx_metrics import attention_distances, plot_attention_distances, plot_attention_maps
from tjx_metrics.plotting.attention import (
    attention_distances_figure,
    attention_maps_figure,
    by_powers_of_two,
    mean_distance,
)


def causal(layers: int, heads: int, queries: int, keys: int, seed: int = 0) -> NDArray[Any]:
    scores = np.random.default_rng(seed).random((layers, heads, queries, keys))
    seen = np.arange(keys) <= np.arange(queries)[:, None] + keys - queries
    return np.asarray(np.where(seen, scores, 0) / np.where(seen, scores, 0).sum(-1, keepdims=True))


def slow_distances(weights: NDArray[Any]) -> NDArray[Any]:
    layers, heads, queries, keys = weights.shape
    shares = np.zeros((layers, heads, keys))
    for layer in range(layers):
        for head in range(heads):
            for query in range(queries):
                for key in range(keys):
                    distance = abs(query + keys - queries - key)
                    shares[layer, head, distance] += weights[layer, head, query, key]
            shares[layer, head] /= max(weights[layer, head].sum(), 1e-300)
    return shares


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 3), st.booleans())
def test_distances_equal_a_loop(
    layers: int, heads: int, queries: int, cached: int, both_ways: bool
) -> None:
    weights = causal(layers, heads, queries, queries + cached)
    if both_ways:
        weights = np.random.default_rng(1).dirichlet(
            np.ones(queries + cached), (layers, heads, queries)
        )
    weights[0, 0, 0] = 0  # padding
    np.testing.assert_allclose(attention_distances(weights), slow_distances(weights), atol=1e-12)


def test_float32_weights_of_a_long_text_add_up() -> None:
    weights = np.full((1, 1, 700, 700), 1 / 700, np.float32)
    shares = attention_distances(weights)
    assert shares.dtype == np.float64
    assert shares.sum() == pytest.approx(1, abs=1e-9)
    # Of n * n pairs, n are at distance 0 and 2 * (n - d) at distance d.
    assert shares[0, 0, 1] == pytest.approx(2 * 699 / 700**2, rel=1e-6)
    assert mean_distance(shares)[0, 0] == pytest.approx((700**2 - 1) / (3 * 700), rel=1e-6)


def test_bins_by_powers_of_two_preserve_the_sum() -> None:
    shares = np.random.default_rng(0).random((2, 3, 13))
    binned, labels = by_powers_of_two(shares)
    assert labels == ["0", "1", "2–3", "4–7", "8–12"]  # noqa: RUF001  as it is printed
    np.testing.assert_allclose(binned[..., 3], shares[..., 4:8].sum(-1))
    np.testing.assert_allclose(binned.sum(-1), shares.sum(-1))


def test_maps_show_the_weights_by_layer_and_head() -> None:
    weights = causal(2, 3, 4, 5)
    words = ["The", " king", "$x_1$", "\n", "\u4e2d"]
    figure = attention_maps_figure(weights, words, "Maps")
    maps = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert len(maps) == 6
    for index, axes in enumerate(maps):
        drawn = np.asarray(axes.get_images()[0].get_array())
        np.testing.assert_allclose(drawn**2, weights[index // 3, index % 3], atol=1e-12)
        assert axes.get_images()[0].get_clim() == (0.0, 1.0)
    keys = [text.get_text() for text in maps[-1].get_xticklabels()]
    queries = [text.get_text() for text in maps[0].get_yticklabels()]
    assert keys == ["The", " king", "$x_1$", "\u21b5", "\\u4e2d"]
    assert queries == keys[1:]  # the queries are the last of the keys
    assert not any(text.get_parse_math() for text in maps[-1].get_xticklabels())


def test_long_texts_are_labeled_by_position() -> None:
    figure = attention_maps_figure(causal(1, 1, 10, 50), ["w"] * 50, "Maps")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["40", "49"]
    assert axes.get_xticks().tolist() == [0, 49]


def test_the_distance_plot_has_a_row_for_each_head() -> None:
    shares = attention_distances(causal(2, 3, 16, 16))
    figure = attention_distances_figure(shares, "Distances")
    layers = [axes for axes in figure.axes if axes.get_title().startswith("layer")]
    assert [np.asarray(axes.get_images()[0].get_array()).shape for axes in layers] == [(3, 5)] * 2
    binned, _ = by_powers_of_two(shares)
    np.testing.assert_allclose(np.asarray(layers[1].get_images()[0].get_array()) ** 2, binned[1])
    assert layers[0].get_title() == f"layer 0: mean {mean_distance(shares)[0].mean():.1f}"


def test_files_are_written_for_small_and_large_models(tmp_path: Path) -> None:
    plot_attention_maps(causal(1, 1, 1, 1), ["a"], tmp_path / "one.png")
    plot_attention_maps(causal(2, 12, 8, 8), None, tmp_path / "many.svg", title="GPT-2")
    plot_attention_distances(attention_distances(causal(4, 2, 9, 9)), tmp_path / "far.pdf")
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "many.svg", "far.pdf"}


def test_invalid_weights_are_errors(tmp_path: Path) -> None:
    good = causal(1, 1, 3, 3)
    for bad in (good[0], causal(1, 1, 3, 3)[:, :, :, :2], np.zeros((1, 0, 3, 3))):
        with pytest.raises(ValueError, match=r"expected \[layers, heads, queries, keys\]"):
            attention_distances(bad)
    for bad in (-good, np.where(good > 0, good, np.nan)):
        with pytest.raises(ValueError, match="expected softmax weights"):
            plot_attention_maps(bad, None, tmp_path / "a.png")
    with pytest.raises(ValueError, match="tokens: got 2; expected 3"):
        plot_attention_maps(good, ["a", "b"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="values outside of"):
        plot_attention_distances(good[0] * 5, tmp_path / "a.png")
    with pytest.raises(ValueError, match="expected an ending of png, pdf, svg"):
        plot_attention_maps(good, None, tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())
