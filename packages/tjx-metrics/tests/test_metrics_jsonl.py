"""JSON-lines files: after any crash and resume, each step is recorded once in valid JSON."""

import errno
import json
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tjx_metrics import (
    CompositeTracker,
    Histogram,
    JsonlTracker,
    RecordError,
    RecordWarning,
    Tracker,
    read_metrics,
)
from tjx_metrics.trackers import jsonl_file


def run(path: Path, first: int, last: int, resume_step: int | None) -> None:
    tracker = JsonlTracker(path, resume_step=resume_step)
    for step in range(first, last + 1):
        tracker.log({"train/loss": 10.0 / (step + 1)}, step=step)
    tracker.finish()


@settings(max_examples=60)
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
        # Lines are written before their checkpoint; later lines may be cut anywhere.
        checkpoint = data.draw(st.integers(checkpoint, reached))
        content = path.read_bytes()
        whole = b"".join(content.splitlines(keepends=True)[: checkpoint + 1])
        path.write_bytes(content[: data.draw(st.integers(len(whole), len(content)))])
    run(path, checkpoint + 1, last, checkpoint)

    assert path.read_bytes() == unbroken.read_bytes()
    assert sorted(file.name for file in folder.iterdir()) == ["metrics.jsonl", "unbroken.jsonl"]


@given(st.floats(allow_nan=True, allow_infinity=True))
@settings(max_examples=50)
def test_floats_round_trip_and_lines_are_strict_json(
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


def test_a_line_is_readable_after_log_returns(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "new" / "m.jsonl")
    tracker.log({"x": 1.0}, step=1)
    assert read_metrics(tmp_path / "new" / "m.jsonl") == [{"step": 1, "x": 1.0}]
    tracker.finish()
    tracker.finish()
    with pytest.raises(ValueError, match="is finished"):
        tracker.log({"x": 1.0}, step=2)


def test_a_new_run_does_not_append_to_an_existing_file(tmp_path: Path) -> None:
    run(tmp_path / "m.jsonl", 0, 3, None)
    with pytest.raises(ValueError, match="already holds metrics: pass resume_step"):
        JsonlTracker(tmp_path / "m.jsonl")
    run(tmp_path / "m.jsonl", 0, 1, -1)
    assert [record["step"] for record in read_metrics(tmp_path / "m.jsonl")] == [0, 1]


@pytest.mark.parametrize("damage", [b"\xff\x00\n", b"[" * 100_000 + b"\n", b'{"step": "x"}\n'])
def test_damaged_lines_are_removed_and_the_file_is_backed_up(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "m.jsonl"
    content = b'{"step": 1}\n' + damage + b'{"step": 3}\n{"step": 4}\n' + damage + b'{"step": 9}\n'
    path.write_bytes(content)
    with pytest.warns(RecordWarning, match="line 2: got no JSON object"):
        assert [record["step"] for record in read_metrics(path)] == [1, 3, 4, 9]
    with pytest.warns(RecordWarning, match=r"the original file is .*m\.jsonl\.damaged$"):
        JsonlTracker(path, resume_step=3).finish()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'
    assert (tmp_path / "m.jsonl.damaged").read_bytes() == content
    path.write_bytes(content)
    with pytest.warns(RecordWarning, match=r"damaged\.2$"):
        JsonlTracker(path, resume_step=9).finish()
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "m.jsonl", "m.jsonl.damaged", "m.jsonl.damaged.2",
    }  # fmt: skip


def test_a_file_without_metrics_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("hello\nworld\n")
    with pytest.raises(ValueError, match="line 1: got no JSON object"):
        read_metrics(path)
    os.mkfifo(tmp_path / "fifo")
    for name in (str(tmp_path / "fifo"), "/dev/zero"):
        with pytest.raises(ValueError, match="no regular file"):
            read_metrics(name)


def test_flush_syncs_the_file_and_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_ino))
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    assert flushed == [tmp_path.stat().st_ino]
    tracker.log({"x": 1.0}, step=1)
    tracker.flush()
    assert flushed[1:] == [tracker.path.stat().st_ino]
    assert tracker.logged_bytes == tracker.path.stat().st_size
    tracker.finish()
    tracker.flush()  # after the end there is nothing to flush


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_failed_flush_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_error: Any
) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl", on_error=on_error)

    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        if on_error == "stop":
            with pytest.raises(RecordError, match="I/O error"):
                tracker.flush()
        else:
            with pytest.warns(RecordWarning, match="cannot be flushed"):
                tracker.flush()
    tracker.finish()


def test_records_of_the_resumed_step_are_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    run(path, 1, 5, None)
    before = path.read_bytes()
    tracker = JsonlTracker(path, resume_step=5)
    tracker.log({"train/loss": 99.0}, step=5)  # it is there
    assert path.read_bytes() == before
    tracker.log({"eval/loss": 1.0}, step=5)
    tracker.log({"train/loss": 9.0}, step=6)
    tracker.finish()
    assert read_metrics(path)[-2:] == [
        {"step": 5, "eval/loss": 1.0},
        {"step": 6, "train/loss": 9.0},
    ]


def histogram() -> Histogram:
    return Histogram(np.array([2, 0, 1]), np.array([-1.0, 0.0, 0.5, np.inf]))


def test_histograms_and_texts_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for first, resume_step in ((1, None), (2, 2)):  # what stands of step 2 is not written twice
        tracker = JsonlTracker(path, resume_step=resume_step)
        for step in range(first, 4):
            tracker.log({"x": float(step)}, step=step)
            tracker.log_histograms({"histograms/parameter/wte": histogram()}, step=step)
            tracker.log_texts({"samples/text": "NaN\n" * step}, step=step)
        tracker.finish()
    records = read_metrics(path)
    assert [record["step"] for record in records] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert records[3:6] == [
        {"step": 2, "x": 2.0},
        {
            "step": 2,
            "histograms/parameter/wte": {
                "counts": [2, 0, 1],
                "edges": [-1.0, 0.0, 0.5, math.inf],
            },
        },
        {"step": 2, "samples/text": {"text": "NaN\nNaN\n"}},
    ]


@pytest.mark.parametrize(
    ("counts", "edges"), [([1, 2], [0.0, 1.0]), ([], [0.0]), ([[1]], [0.0, 1.0]), ([0.5], [0, 1])]
)
def test_invalid_histograms_are_errors(tmp_path: Path, counts: Any, edges: Any) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    wrong = Histogram(np.array(counts), np.array(edges))
    with pytest.raises(ValueError, match=r"histogram h: got counts of .*; expected"):
        tracker.log_histograms({"h": wrong}, step=1)
    tracker.finish()
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_a_long_file_is_truncated_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.jsonl"
    lines = [f'{{"step": {step // 2}, "x": "{"y" * (step % 300)}"}}\n' for step in range(4000)]
    # A sparse region of 10 GB, which must not be read.
    hole = 10 * 2**30
    with path.open("wb") as file:
        file.seek(hole)
        file.write(b"\n" + "".join(lines).encode() + b'{"step": 2000, "x"')
    seen = 0
    read = jsonl_file._reversed_lines

    def counted(*arguments: Any) -> Any:
        nonlocal seen
        for place, line in read(*arguments):
            seen += len(line)
            yield place, line

    monkeypatch.setattr(jsonl_file, "_reversed_lines", counted)
    JsonlTracker(path, resume_step=1700).finish()
    kept = "".join(lines[:3402])
    assert path.stat().st_size == hole + 1 + len(kept)
    assert seen < len("".join(lines[3390:])) + 100
    with path.open("rb") as cut:
        cut.seek(hole + 1)
        assert cut.read().decode() == kept


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Limit the file size of this process: a line is written partially, further ones fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_on_a_full_disk_a_line_is_complete_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"x": 1.0}, step=1)
    whole = path.read_bytes()
    with full_disk(len(whole) + 5), pytest.raises(RecordError, match=r"m\.jsonl cannot be written"):
        tracker.log({"x": 2.0}, step=2)
    assert path.read_bytes() == whole
    tracker.finish()
    assert path.read_bytes() == whole


def test_lines_are_buffered_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tracker = JsonlTracker(path, on_error="continue", max_kept=3)
    tracker.log({"x": 0}, step=0)
    whole = path.read_bytes()
    with full_disk(len(whole) + 5):
        with pytest.warns(RecordWarning, match="buffered in memory"):
            tracker.log({"x": 1}, step=1)
        tracker.log({"x": 2}, step=2)
        tracker.log({"x": 3}, step=3)
        assert path.read_bytes() == whole
        with pytest.warns(
            RecordWarning, match="more than 3 lines are buffered: the oldest is lost"
        ):
            tracker.log({"x": 4}, step=4)
    tracker.log({"x": 5}, step=5)  # the disk has room again
    tracker.finish()
    assert [record["step"] for record in read_metrics(path)] == [0, 2, 3, 4, 5]


def test_lost_lines_are_an_error_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tracker = JsonlTracker(path, on_error="continue")
    with full_disk(5):
        with pytest.warns(RecordWarning):
            tracker.log({"x": 1}, step=1)
        with pytest.raises(RecordError, match="1 buffered lines are lost") as error:
            tracker.finish()
    assert error.value.errno == errno.EFBIG
    tracker.finish()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("metrics", [{"step": 1.0}, {"x": np.zeros(2)}, {"x": np.array(1j)}])
def test_invalid_metrics_are_errors_and_write_nothing(tmp_path: Path, metrics: Any) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match=r"name 'step'|expected a single real number"):
        tracker.log(metrics, step=1)
    tracker.finish()
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_hyperparameters_and_summary_are_separate_files(tmp_path: Path) -> None:
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
    """A tracker whose `finish` fails."""

    def log_hyperparameters(self, hyperparameters: Any) -> None: ...

    def log(self, metrics: Any, step: int) -> None: ...

    def log_histograms(self, histograms: Any, step: int) -> None: ...

    def log_texts(self, texts: Any, step: int) -> None: ...

    def log_summary(self, summary: Any) -> None: ...

    def finish(self) -> None:
        raise OSError("no space")


def test_a_composite_forwards_and_finishes_all(tmp_path: Path) -> None:
    files = [JsonlTracker(tmp_path / f"{name}.jsonl") for name in "ab"]
    composite = CompositeTracker([files[0], Failing(), files[1]])
    assert isinstance(composite, Tracker)
    composite.log({"x": 1.0}, step=1)
    composite.log_histograms({"h": histogram()}, step=1)
    composite.log_texts({"t": "once"}, step=1)
    with pytest.raises(ExceptionGroup, match="failed to finish") as error:
        composite.finish()
    assert error.group_contains(OSError, match="no space")
    for file in files:
        number, _, text = read_metrics(file.path)
        assert (number, text) == ({"step": 1, "x": 1.0}, {"step": 1, "t": {"text": "once"}})
        with pytest.raises(ValueError, match="finished"):
            file.log({}, step=2)
