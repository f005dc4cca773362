"""After any crash and resume each step stands once, and every line is JSON."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_metrics import CompositeTracker, JsonlTracker, Tracker, read_metrics


def run(path: Path, first: int, last: int, resume_step: int | None) -> None:
    tracker = JsonlTracker(path, resume_step=resume_step)
    for step in range(first, last + 1):
        tracker.log({"train/loss": 10.0 / (step + 1)}, step=step)
    tracker.finish()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_crashes_at_any_byte_leave_the_file_of_an_unbroken_run(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("run")
    path, unbroken = folder / "metrics.jsonl", folder / "unbroken.jsonl"
    last = data.draw(st.integers(1, 8))
    run(unbroken, 0, last, None)

    checkpoint = -1  # nothing saved yet
    for _ in range(data.draw(st.integers(1, 3))):
        reached = data.draw(st.integers(max(checkpoint, 0), last))
        run(path, checkpoint + 1, reached, checkpoint)
        # A checkpoint never runs ahead of its lines; what comes after may be cut anywhere.
        checkpoint = data.draw(st.integers(checkpoint, reached))
        content = path.read_bytes()
        whole = b"".join(content.splitlines(keepends=True)[: checkpoint + 1])
        path.write_bytes(content[: data.draw(st.integers(len(whole), len(content)))])
    run(path, checkpoint + 1, last, checkpoint)

    assert path.read_bytes() == unbroken.read_bytes()
    assert sorted(file.name for file in folder.iterdir()) == ["metrics.jsonl", "unbroken.jsonl"]


@given(st.floats(allow_nan=True, allow_infinity=True))
@settings(max_examples=50, deadline=None)
def test_every_float_comes_back_and_every_line_is_strict_json(
    tmp_path_factory: pytest.TempPathFactory, value: float
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"x": value}, step=1)
    tracker.finish()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (record,) = read_metrics(path)
    assert record["x"] == value or (math.isnan(record["x"]) and math.isnan(value))


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (3, 3),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.array([0.5]), 0.5),
        (ml_dtypes.bfloat16(0.5), 0.5),
    ],
)
def test_numpy_scalars_are_numbers(tmp_path: Path, value: Any, want: float) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log({"x": value}, step=7)
    tracker.finish()
    assert (tmp_path / "m.jsonl").read_text() == f'{{"step": 7, "x": {want}}}\n'


def test_jax_scalars_are_numbers(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log(jax.device_put({"x": np.float32(0.25), "n": np.int32(4)}), step=1)
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "x": 0.25, "n": 4}]
    tracker.finish()


def test_a_line_can_be_read_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "new" / "m.jsonl")
    tracker.log({"x": 1.0}, step=1)
    assert read_metrics(tmp_path / "new" / "m.jsonl") == [{"step": 1, "x": 1.0}]
    tracker.finish()
    tracker.finish()
    with pytest.raises(ValueError, match="is finished"):
        tracker.log({"x": 1.0}, step=2)


def test_metrics_of_another_run_are_not_appended_to(tmp_path: Path) -> None:
    run(tmp_path / "m.jsonl", 0, 3, None)
    with pytest.raises(ValueError, match="already holds metrics: pass resume_step"):
        JsonlTracker(tmp_path / "m.jsonl")
    run(tmp_path / "m.jsonl", 0, 1, -1)
    assert [record["step"] for record in read_metrics(tmp_path / "m.jsonl")] == [0, 1]


def test_damage_before_the_last_line_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\x00\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2: must be a JSON object"):
        JsonlTracker(path, resume_step=3)
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("metrics", [{"step": 1.0}, {"x": np.zeros(2)}, {"x": np.array(1j)}])
def test_what_is_no_metric_is_refused_and_nothing_is_written(tmp_path: Path, metrics: Any) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match=r"called 'step'|must be a single real number"):
        tracker.log(metrics, step=1)
    tracker.finish()
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_settings_and_results_stand_beside_the_metrics(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log_hyperparameters({"model": {"n_layer": 2}, "path": tmp_path})
    tracker.log_summary({"eval/loss": math.inf})
    tracker.finish()
    settings_file = tmp_path / "metrics.hyperparameters.json"
    assert json.loads(settings_file.read_text()) == {
        "model": {"n_layer": 2},
        "path": str(tmp_path),
    }
    summary_file = tmp_path / "metrics.summary.json"
    assert json.loads(summary_file.read_text()) == {"eval/loss": "Infinity"}
    assert (tmp_path / "metrics.jsonl").read_text() == ""


class Failing:
    """A tracker whose end fails."""

    def log_hyperparameters(self, hyperparameters: Any) -> None: ...

    def log(self, metrics: Any, step: int) -> None: ...

    def log_summary(self, summary: Any) -> None: ...

    def finish(self) -> None:
        raise OSError("no space")


def test_a_composite_tells_all_and_finishes_all(tmp_path: Path) -> None:
    files = [JsonlTracker(tmp_path / f"{name}.jsonl") for name in "ab"]
    composite = CompositeTracker([files[0], Failing(), files[1]])
    assert isinstance(composite, Tracker)
    composite.log({"x": 1.0}, step=1)
    with pytest.raises(ExceptionGroup, match="failed to finish") as error:
        composite.finish()
    assert error.group_contains(OSError, match="no space")
    for file in files:
        assert read_metrics(file.path) == [{"step": 1, "x": 1.0}]
        with pytest.raises(ValueError, match="finished"):
            file.log({}, step=2)
