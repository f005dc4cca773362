"""Plot files: reproducible, correct data, no global state."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tjx_metrics import JsonlTracker, plot_loss
from tjx_metrics.plotting.smoothing import moving_average


def write_run(folder: Path, losses: list[float], evaluations: dict[int, float]) -> Path:
    tracker = JsonlTracker(folder / "metrics.jsonl")
    for step, loss in enumerate(losses):
        tracker.log({"train/loss": loss}, step=step)
        if step in evaluations:
            tracker.log({"eval/loss": evaluations[step]}, step=step)
    tracker.finish()
    return folder / "metrics.jsonl"


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def has_color(picture: np.ndarray[Any, Any], color: str) -> bool:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(picture - rgb[None, None, :]).sum(axis=-1) < 12).sum() > 100)


BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def test_a_plot_has_the_recorded_curves(tmp_path: Path) -> None:
    falling = [8 * 0.97**step + 2 for step in range(200)]
    both = write_run(tmp_path / "both", falling, {0: 9.9, 100: 3.0, 199: 2.5})
    alone = write_run(tmp_path / "alone", falling, {})
    plot_loss(both, tmp_path / "both.png")
    plot_loss(str(tmp_path / "alone"), tmp_path / "plots" / "alone.png")  # a run's folder will do
    plot_loss([both, alone], tmp_path / "compared.png", labels=["$a", "b_1$"], title="Two runs")

    first, second = pixels(tmp_path / "both.png"), pixels(tmp_path / "plots" / "alone.png")
    assert first.shape == second.shape == (960, 1440, 3)
    assert has_color(first, BLUE)
    assert has_color(first, ORANGE)
    assert has_color(second, BLUE)
    assert not has_color(second, ORANGE)
    assert pixels(tmp_path / "compared.png").shape[1] == first.shape[1]  # a column is a column
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".png", ".png"]


def test_plot_files_depend_only_on_the_data(tmp_path: Path) -> None:
    for name, losses in (("a", [3.0, 2.0]), ("b", [3.0, 1.0]), ("c", [3.0, 2.0])):
        path = write_run(tmp_path / name, losses, {})
        plot_loss(path, tmp_path / f"{name}.png", title="run")
    a, b, c = (pixels(tmp_path / f"{name}.png") for name in "abc")
    assert (a != b).any()
    assert (a == c).all()


def test_runs_with_nan_or_incomplete_lines_are_plotted(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [3.0, float("inf"), float("nan"), 2.0], {3: float("nan")})
    with path.open("a") as file:
        file.write('{"step": 4, "train/lo')
    plot_loss(path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_plotting_errors_are_reported(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [3.0], {})
    with pytest.raises(ValueError, match="expected an ending of png, pdf, svg"):
        plot_loss(path, tmp_path / "loss.bmp")
    with pytest.raises(ValueError, match="labels: got 2 for 1 runs"):
        plot_loss(path, tmp_path / "loss.png", labels=["a", "b"])
    (tmp_path / "other.jsonl").write_text('{"step": 1, "x": 2.0}\n')
    with pytest.raises(ValueError, match="neither train/loss nor eval/loss"):
        plot_loss(tmp_path / "other.jsonl", tmp_path / "loss.png")
    with pytest.raises(FileNotFoundError):
        plot_loss(tmp_path / "missing.jsonl", tmp_path / "loss.png")


def test_plotting_does_not_import_pyplot(tmp_path: Path) -> None:
    plot_loss(write_run(tmp_path / "run", [3.0], {}), tmp_path / "loss.svg")
    assert "matplotlib.pyplot" not in sys.modules


@given(
    st.lists(st.floats(-100, 100) | st.just(float("nan")), min_size=1, max_size=30),
    st.integers(1, 12),
)
def test_the_moving_average_is_the_mean_of_finite_neighbors(
    values: list[float], window: int
) -> None:
    got = moving_average(np.array(values), window)
    half = (window - 1) // 2
    for i, average in enumerate(got):
        before = min(half, i)
        near = [v for v in values[i - before : i + before + 1] if np.isfinite(v)]
        if near:
            assert average == pytest.approx(np.mean(near), abs=1e-9)
        else:
            assert np.isnan(average)
