"""Plots of runs: data of lines, limits, labels and areas of the figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

import tjx_metrics
from tjx_metrics import RecordWarning
from tjx_metrics.plotting.curves import PlotOptions, loss_figure, metric_figure
from tjx_metrics.plotting.histograms import (
    histogram_quantiles,
    histograms_figure,
    resample,
)
from tjx_metrics.plotting.layer_norms import layer_norms, layer_norms_figure
from tjx_metrics.plotting.performance import throughput_figure, time_split, time_split_figure
from tjx_metrics.plotting.run_data import NoDataError, RunData, RunDataError, open_run, open_runs
from tjx_metrics.plotting.style import robust_limits


def run_of(records: list[dict[str, Any]], name: str = "run") -> RunData:
    return RunData(name, Path(name) / "metrics.jsonl", records)


def falling(count: int = 200) -> list[dict[str, Any]]:
    """Return records of a loss that falls steeply from 11 to 3."""
    return [
        {
            "step": 10 * i, "train/loss": 3 + 8 * 0.5**i, "train/tokens": 1000 * i,
            "train/hours": i / 100, "train/learning_rate": 1e-3 / (i + 1),
            "train/tokens_per_sec": 500.0 + i, "train/mfu": 0.4,
            **({"eval/loss": 3.1 + 8 * 0.5**i} if i % 50 == 0 else {}),
        }
        for i in range(count)
    ]  # fmt: skip


def line(axes: Axes, label: str) -> tuple[Any, Any]:
    (found,) = [each for each in axes.get_lines() if str(each.get_label()).startswith(label)]
    return found.get_xdata(), found.get_ydata()


def test_a_steep_start_is_cut_off() -> None:
    axes = loss_figure([run_of(falling())], PlotOptions()).axes[0]
    low, high = axes.get_ylim()
    assert low < 3.0 < high < 4.0
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_title().get_text() == "cut off above: up to 11.1"
    _, losses = line(axes, "evaluation")
    np.testing.assert_allclose(losses, [3.1 + 8 * 0.5**i for i in (0, 50, 100, 150)])


def test_a_slow_fall_is_not_cut_off_and_a_diverged_run_is() -> None:
    slow = np.linspace(8, 4, 100)
    assert robust_limits([slow]) == pytest.approx((3.8, 8.2))
    few = np.array([9.0, 2.0, 1.0])  # the start is no small part of so few
    assert robust_limits([few]) == pytest.approx((0.6, 9.4))
    diverged = np.concatenate([slow, np.full(50, 1e6), [np.nan]])
    limits = robust_limits([slow, diverged])
    assert limits is not None
    assert limits[1] < 10
    assert robust_limits([np.array([np.nan])]) is None
    assert robust_limits([np.array([2.0])]) == pytest.approx((1.9, 2.1))
    log = robust_limits([np.array([0.0, 1e-3, 1e-1])], log=True)
    assert log is not None
    assert 0 < log[0] < 1e-3


@pytest.mark.parametrize(
    ("x", "label", "last"), [("steps", "Step", 1990), ("tokens", "Tokens", 199_000),
                             ("hours", "Hours", 1.99)]
)  # fmt: skip
def test_the_x_axis_is_steps_tokens_or_hours(x: Any, label: str, last: float) -> None:
    axes = loss_figure([run_of(falling())], PlotOptions(x)).axes[0]
    assert axes.get_xlabel() == label
    assert line(axes, "training")[0][-1] == pytest.approx(last)
    # An evaluation has the x value of the training records of its step.
    assert line(axes, "evaluation")[0][1] == pytest.approx(last * 50 / 199)


def test_logarithmic_axes_omit_values_that_are_not_positive() -> None:
    axes = loss_figure([run_of(falling())], PlotOptions(log_x=True, log_y=True)).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert line(axes, "training")[0][0] == 10
    assert axes.get_ylim()[0] > 0


def test_runs_differ_in_color_line_style_and_marker() -> None:
    runs = [run_of(falling(), f"run_{i}") for i in range(9)]
    figure = loss_figure(runs, PlotOptions())
    looks = {
        (each.get_color(), str(each.get_linestyle()), each.get_marker())
        for each in figure.axes[0].get_lines()
        if str(each.get_label()).startswith("run")
    }
    assert len(looks) == 9
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[0] == "run_0 (lowest 3.100)"


def test_run_names_are_distinct_and_not_parsed_as_math(tmp_path: Path) -> None:
    for place in ("a/$x$", "b/$x$"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    runs = open_runs([tmp_path / "a/$x$", tmp_path / "b/$x$"])
    assert [run.name for run in runs] == ["a/$x$", "b/$x$"]
    texts = loss_figure(runs, PlotOptions()).legends[0].get_texts()
    assert not any(text.get_parse_math() for text in texts)


def test_a_metric_is_smoothed_by_the_window() -> None:
    run = run_of([{"step": i, "train/grad_norm": float(i % 2)} for i in range(20)])
    raw = metric_figure([run], "train/grad_norm", PlotOptions(window=1)).axes[0]
    smooth = metric_figure([run], "train/grad_norm", PlotOptions(window=3)).axes[0]
    assert set(line(raw, "run")[1]) == {0.0, 1.0}
    np.testing.assert_allclose(line(smooth, "run")[1][1:3], [1 / 3, 2 / 3])
    assert raw.get_ylabel() == "Gradient norm"


def test_throughput_axes_start_at_zero_and_show_mfu_if_recorded() -> None:
    run = run_of(falling())
    figure = throughput_figure([run], PlotOptions(window=1))
    rates, shares = figure.axes
    assert rates.get_ylim()[0] == shares.get_ylim()[0] == 0
    np.testing.assert_allclose(line(shares, "run")[1], 0.4)
    assert shares.yaxis.get_major_formatter().format_ticks([0.2, 0.4]) == ["20.0%", "40.0%"]
    bare = run_of([{"step": 1, "train/tokens_per_sec": 5.0}])
    assert len(throughput_figure([bare], PlotOptions()).axes) == 1
    with pytest.raises(NoDataError, match="no record of train/tokens_per_sec"):
        throughput_figure([run_of([{"step": 1, "train/loss": 1.0}])], PlotOptions())


def test_fractions_of_time_sum_to_one() -> None:
    records = [
        {"step": 10 * i, "time/device": 3.0, "time/data_wait": 1.0, "time/evaluation": 0.0}
        for i in range(1, 301)
    ]
    records[-1]["time/evaluation"] = 12.0
    run = run_of(records)
    steps, seconds = time_split(run)
    assert steps.size == 300
    assert seconds["time/evaluation"].sum() == 12
    figure = time_split_figure(run, PlotOptions())
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    whole = 300 * 4 + 12
    assert names == [
        f"device: training steps ({900 / whole:.1%})",
        f"evaluation ({12 / whole:.1%})",
        f"data_wait: waiting for batches ({300 / whole:.1%})",
    ]
    assert figure.axes[0].get_xlim() == (0, 3000)
    areas = [area.get_paths()[0] for area in figure.axes[0].collections]
    tops = [np.asarray(area.vertices)[:, 1].max() for area in areas]
    assert tops[-1] == pytest.approx(1)
    assert tops[0] == pytest.approx(0.75)


def norms_run() -> RunData:
    return run_of(
        [
            {
                "step": step,
                "norms/gradient/encoder/blocks/mlp/kernel/0": 3.0,
                "norms/gradient/encoder/blocks/mlp/bias/0": 4.0,
                **{f"norms/gradient/encoder/blocks/mlp/kernel/{i}": 1.0 for i in range(1, 12)},
                "norms/gradient/wte/embedding": 2.0 / step,
            }
            for step in (1, 2, 3)
        ]
    )


def test_layer_norms_combine_all_parameters_of_a_layer() -> None:
    steps, norms = layer_norms(norms_run(), "gradient")
    assert steps.tolist() == [1, 2, 3]
    # Sorted by depth, not by name; other parameters come last.
    assert list(norms) == [f"encoder/blocks {i}" for i in range(12)] + ["wte"]
    np.testing.assert_allclose(norms["encoder/blocks 0"], 5.0)
    np.testing.assert_allclose(norms["wte"], [2, 1, 2 / 3])
    _, one = layer_norms(norms_run(), "gradient", "encoder/blocks/mlp/bias")
    assert list(one) == ["encoder/blocks 0"]
    with pytest.raises(RunDataError, match="nearest: encoder/blocks/mlp/bias"):
        layer_norms(norms_run(), "gradient", "blocks/mlp/bais")
    with pytest.raises(NoDataError, match="norms/update/"):
        layer_norms(norms_run(), "update")


def test_the_heat_map_has_a_row_for_each_layer() -> None:
    lines, heat, _ = layer_norms_figure(norms_run(), PlotOptions(), "gradient").axes
    assert len(lines.get_lines()) == 13
    assert [text.get_text() for text in heat.get_yticklabels()][0::12] == [
        "encoder/blocks 0",
        "wte",
    ]
    drawn = np.asarray(heat.collections[0].get_array())
    np.testing.assert_allclose(drawn[12], [2, 1, 2 / 3])


def test_histograms_are_resampled_and_quantiles_lie_in_nonempty_bins() -> None:
    counts, edges = np.array([0, 4, 0, 4, 0]), np.arange(6.0)
    np.testing.assert_allclose(
        resample(counts, edges, np.array([0, 1.5, 3.0, 5.0])), [0.25, 0.25, 0.5]
    )
    np.testing.assert_allclose(histogram_quantiles(counts, edges, [0.0, 0.25, 1.0]), [1, 1.5, 4])
    assert np.isnan(histogram_quantiles(np.zeros(2), np.arange(3.0), [0.5])).all()
    values = np.random.default_rng(0).normal(size=20_000)
    fine = np.histogram(values, 400)
    want = np.quantile(values, [0.05, 0.5, 0.95])
    np.testing.assert_allclose(histogram_quantiles(*fine, [0.05, 0.5, 0.95]), want, atol=0.02)


def histogram_run() -> RunData:
    records: list[dict[str, Any]] = []
    for step in (0, 10, 20):
        record: dict[str, Any] = {"step": step}
        for i in range(10):
            record[f"histograms/parameter/blocks/kernel/{i}"] = {
                "counts": [1, 2, 1], "edges": [-1.0 - step, 0.0, 1.0, 2.0 + step],
            }  # fmt: skip
        record["histograms/parameter/wte"] = {"counts": [0, 0], "edges": [0.0, 1.0, 2.0]}
        records.append(record)
    return run_of(records)


def test_first_and_last_layers_are_selected_of_many_histograms() -> None:
    figure = histograms_figure(histogram_run())
    titles = [axes.get_title().replace("\n", "") for axes in figure.axes]
    assert titles == ["parameter/wte", "parameter/blocks/kernel/0", "parameter/blocks/kernel/9"]
    drawn = np.asarray(figure.axes[1].collections[0].get_array())
    np.testing.assert_allclose(drawn.sum(axis=0)[0], 1.0)  # all values of the first step are seen
    median = figure.axes[1].get_lines()[1].get_ydata()
    np.testing.assert_allclose(np.asarray(median), 0.5)
    chosen = histograms_figure(histogram_run(), ["histograms/parameter/blocks/kernel/4"])
    assert len(chosen.axes) == 1
    with pytest.raises(RunDataError, match="nearest: histograms/parameter/blocks/kernel/"):
        histograms_figure(histogram_run(), ["histograms/parameter/blocks/kernal/4"])
    with pytest.raises(NoDataError, match="has no histograms"):
        histograms_figure(run_of(falling()))
    broken = run_of([{"step": 1, "histograms/a": {"counts": [1], "edges": [0.0]}}])
    with pytest.raises(RunDataError, match="histograms/a is no histogram"):
        histograms_figure(broken)


def test_every_public_plot_function_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    time = {"time/device": 1.0, "time/other": 0.5}
    records = [each | time for each in falling(5)] + histogram_run().records + norms_run().records
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tjx_metrics.plot_metric(path, "train/mfu", tmp_path / "a.png")
    tjx_metrics.plot_learning_rate([path], tmp_path / "b.png", x="tokens", log_y=True)
    tjx_metrics.plot_throughput(path, tmp_path / "c.pdf", title="Fast")
    tjx_metrics.plot_time_split(path, tmp_path / "d.svg", x="hours")
    tjx_metrics.plot_layer_norms(path.parent, tmp_path / "e.svg", log_x=True)
    tjx_metrics.plot_histograms(path.parent, tmp_path / "f.svg")
    assert {each.name[0] for each in tmp_path.glob("*.*")} == set("abcdef")


def test_series_have_unique_ordered_steps() -> None:
    run = run_of([{"step": 2, "a": 1.0}, {"step": 1, "a": float("inf")}, {"step": 2, "a": 3}])
    steps, values = run.series("a")
    assert steps.tolist() == [1, 2]
    np.testing.assert_array_equal(values, [np.nan, 3])
    with pytest.raises(NoDataError, match=r"choose steps$"):
        run.along(steps, "tokens")


def test_damaged_files_are_reported_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\nnot json\n{"step": 2}\n')
    with pytest.warns(RecordWarning, match=r"metrics\.jsonl, line 2"):
        assert open_run(tmp_path).names == ("a",)
    (tmp_path / "metrics.jsonl").write_text("not json\nnor this\n")
    with pytest.raises(RunDataError, match=r"metrics\.jsonl, line 1"):
        open_run(tmp_path)
