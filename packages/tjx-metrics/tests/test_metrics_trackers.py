"""Tracker output is read back with the trackers' own libraries."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tjx_metrics import (
    CompositeTracker,
    Histogram,
    TensorboardTracker,
    TrackedRun,
    TrackerWarning,
    WandbTracker,
    check_trackers,
    open_trackers,
    read_metrics,
    register_tracker,
)
from tjx_metrics.trackers import availability, registration

HISTOGRAM = "histograms/parameter/wte"
COUNTS, EDGES = [2, 0, 3], [-1.0, 0.0, 1.0, 2.0]


def record(tracker: Any, steps: Iterable[int]) -> None:
    tracker.log_hyperparameters({"model.n_layer": 2, "optimizer.name": "adamw", "mesh": [1, 2]})
    for step in steps:
        tracker.log({"train/loss": 1 / step, "eval/loss": np.float32(np.nan)}, step=step)
        histogram = Histogram(np.array(COUNTS), np.array(EDGES))
        tracker.log_histograms({HISTOGRAM: histogram}, step=step)
        tracker.log_texts({"samples/text": f"one <b>\n\n# {step}"}, step=step)
    tracker.log_summary({"eval/loss": 0.5, "run": "a"})


def test_tensorboard_reads_records_and_hides_repeated_steps(tmp_path: Path) -> None:
    first = TensorboardTracker(tmp_path)
    record(first, range(1, 9))
    first.finish()
    first.finish()
    again = TensorboardTracker(tmp_path, resume_step=4)
    again.log({"train/loss": 50.0}, step=5)
    again.finish()
    with pytest.raises(ValueError, match="finished"):
        again.log({"train/loss": 1.0}, step=6)

    run = accumulated(tmp_path)
    scalars = [(event.step, event.value) for event in run.Scalars("train/loss")]
    assert scalars == [
        *((step, np.float32(1 / step)) for step in range(1, 5)),
        (5, 50.0),
    ]
    histograms = run.Histograms(HISTOGRAM)
    assert [event.step for event in histograms] == [1, 2, 3, 4]
    value = histograms[0].histogram_value
    assert (value.bucket_limit, value.bucket) == (EDGES, [0.0, *COUNTS])
    assert (value.min, value.max, value.num, value.sum) == (-1.0, 2.0, 5.0, 3 * 1.5 - 2 * 0.5)
    tensors = {tag: run.Tensors(tag) for tag in run.Tags()["tensors"]}
    texts = tensors["samples/text/text_summary"]
    assert texts[1].tensor_proto.string_val[0].decode() == "    one <b>\n    \n    # 2"
    shown = tensors["hyperparameters/text_summary"][0].tensor_proto.string_val[0].decode()
    assert json.loads(shown)["model.n_layer"] == 2


def accumulated(folder: Path) -> Any:
    """Read event files as TensorBoard does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = EventAccumulator(str(folder), size_guidance=dict.fromkeys(SIZES, 0))
    run.Reload()
    return run


SIZES = ("scalars", "histograms", "tensors")


def test_the_hparams_tab_has_the_hyperparameters(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import metadata

    tracker = TensorboardTracker(tmp_path)
    record(tracker, [1])
    tracker.finish()
    plugin = accumulated(tmp_path).summary_metadata
    start = plugin["_hparams_/session_start_info"].plugin_data.content
    settings = metadata.parse_session_start_info_plugin_data(start).hparams
    assert settings["model.n_layer"].number_value == 2
    assert settings["optimizer.name"].string_value == "adamw"


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = TensorboardTracker(tmp_path)
    record_writer: Any = tracker._writer
    record_writer.close()
    full = Path("/dev/full").open("wb")  # noqa: SIM115  the tracker closes it
    monkeypatch.setattr(record_writer, "_writer", full)
    with pytest.raises(OSError, match="No space left"):
        tracker.log({"train/loss": 1.0}, step=1)
    with pytest.raises(OSError, match="No space left"):
        tracker.finish()


RUN_WANDB = """
import os, signal, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from test_metrics_trackers import record
from tjx_metrics import CompositeTracker, JsonlTracker, open_trackers

_, _, folder, what, first, last = sys.argv
resume_step = int(first) - 1 or None
(tracker,) = open_trackers(
    ["wandb"], folder, name="mine", project="tests", resume_step=resume_step
)
lines = JsonlTracker(folder + "/metrics.jsonl", resume_step=resume_step)
both = CompositeTracker([lines, tracker])
if what != "SIGNONE":
    both.log({"train/loss": 9.0}, step=0)
    while tracker._waiting:
        time.sleep(0.02)
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,comm="], capture_output=True, text=True)
    table = [line.split() for line in listed.stdout.splitlines()]
    (service,) = [int(row[0]) for row in table if row[1:] == [str(os.getpid()), "wandb-core"]]
    print(service, flush=True)
    os.kill(service, getattr(signal, what))
record(both, range(int(first), int(last) + 1))
lines.finish()
tracker.finish(timeout=0.2 if what == "SIGSTOP" else 120.0)
"""


def run_wandb(folder: Path, what: str, first: int, last: int) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-c", RUN_WANDB, str(Path(__file__).parent), str(folder)]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    # To a file, because a stopped service keeps its end of a pipe open.
    with (folder / "output.txt").open("w+") as output:
        done = subprocess.run(
            [*words, what, str(first), str(last)], env=environment, stdout=output, stderr=output,
            timeout=200, check=False, text=True,
        )  # fmt: skip
        output.seek(0)
        done.stdout = output.read()
    return done


def wandb_records(folder: Path) -> list[tuple[str, list[Any]]]:
    """Read each file of an offline run: the run id and W&B's messages."""
    return [
        (path.name.removeprefix("run-").removesuffix(".wandb"), list(messages(path.read_bytes())))
        for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    ]


def messages(content: bytes) -> Iterator[Any]:
    """Parse a transaction log: LevelDB's log format after W&B's header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    read: Any = vars(wandb_internal_pb2)["Record"].FromString

    assert content[:4] == b":W&B"
    place, part = 7, b""
    while place + 7 <= len(content):
        if (room := 2**15 - place % 2**15) < 7:
            place += room
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        part += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield read(part)
            part = b""


def history(found: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for message in found:
        if message.HasField("history"):
            row: dict[str, Any] = {}
            for item in message.history.item:
                *outer, last = item.nested_key
                place = row
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
            rows.append(row)
    return rows


def test_wandb_resumes_the_same_run_offline(tmp_path: Path) -> None:
    for first, last in ((1, 6), (4, 8)):
        done = run_wandb(tmp_path, "SIGNONE", first, last)
        assert (done.returncode, done.stdout) == (0, "")
    (first_id, before), (second_id, after) = wandb_records(tmp_path)
    assert first_id == second_id == (tmp_path / "wandb" / "run_id.txt").read_text().strip()
    for found, steps in ((before, range(1, 7)), (after, range(4, 9))):
        (begun,) = [record.run for record in found if record.HasField("run")]
        assert (begun.project, begun.display_name, begun.run_id) == ("tests", "mine", first_id)
        rows = history(found)
        losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
        assert losses == {step: 1 / step for step in steps}
        # W&B's own step never decreases: rows with a smaller one are rejected.
        assert [row["_step"] for row in rows] == list(range(len(rows)))
        histograms = [row[HISTOGRAM] for row in rows if HISTOGRAM in row]
        assert len(histograms) == len(steps)
        assert (histograms[0]["values"], histograms[0]["bins"]) == (COUNTS, EDGES)
        settings = {
            item.key or "/".join(item.nested_key): item.value_json
            for record in found
            if record.HasField("config")
            for item in record.config.update
        }
        assert json.loads(settings["optimizer.name"]) == "adamw"
        metrics = [record.metric for record in found if record.HasField("metric")]
        assert any(m.glob_name == "*" and m.step_metric == "step" for m in metrics)
    pages = [path.read_text() for path in tmp_path.glob("wandb/*/files/media/html/**/*.html")]
    assert any("one &lt;b>\n\n# 8" in page for page in pages)


def test_a_killed_service_is_restarted_and_gets_later_records(tmp_path: Path) -> None:
    done = run_wandb(tmp_path, "SIGKILL", 1, 20)
    assert done.returncode == 0
    assert done.stdout.count("TrackerWarning: tracker wandb: ") == 1
    assert "Traceback" not in done.stdout
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1 + 3 * 20
    ids, found = zip(*wandb_records(tmp_path), strict=True)
    assert len(set(ids)) == 1
    rows = [row for records in found for row in history(records)]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    # Only records that the service had not written when it was killed are lost.
    assert losses.items() >= {step: 1 / step for step in range(2, 21)}.items()


def test_an_unresponsive_service_does_not_block_the_exit(tmp_path: Path) -> None:
    done = run_wandb(tmp_path, "SIGSTOP", 1, 20)
    os.kill(int(done.stdout.split()[0]), signal.SIGKILL)
    assert done.returncode == 0
    assert done.stdout.count("TrackerWarning: tracker wandb: ") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1 + 3 * 20


WITHOUT_A_KEY = """
import sys, warnings
from pathlib import Path
from tjx_metrics.trackers.wandb import WandbTracker
try:
    WandbTracker("a", directory=Path(sys.argv[1]), project="tests", name="a")
except Exception as error:
    print(error)
"""


def test_wandb_does_not_prompt_for_a_key(tmp_path: Path) -> None:
    # Measured by coverage too, the process does not end.
    dropped = ("WANDB", "COVERAGE")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(dropped)
    }
    ours, terminal = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_KEY, str(tmp_path)],
        env={**environment, "HOME": str(tmp_path), "WANDB_ERROR_REPORTING": "false"},
        stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, timeout=200, text=True,
    )  # fmt: skip
    os.close(terminal)
    with suppress(OSError):  # Linux says so that nothing is left to read
        assert b"choice" not in os.read(ours, 10_000)
    os.close(ours)
    assert "No API key configured" in done.stdout
    assert done.returncode == 0


def test_histograms_for_wandb_have_at_most_512_bins() -> None:
    from tjx_metrics.trackers.wandb import _at_most_bins

    counts, edges = _at_most_bins(Histogram(np.arange(1200), np.arange(1201.0)))
    assert counts.size == 400
    assert counts[:2].tolist() == [0 + 1 + 2, 3 + 4 + 5]
    assert edges[[0, 1, -2, -1]].tolist() == [0.0, 3.0, 1197.0, 1200.0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:trackio")
def test_trackio_stores_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio: Any = pytest.importorskip("trackio")
    storage = trackio.sqlite_storage.SQLiteStorage
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "all")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for first, last in ((1, 6), (4, 8)):
        resume_step = first - 1 or None
        (tracker,) = open_trackers(
            ["trackio"], tmp_path / "mine", project="tests", resume_step=resume_step
        )
        record(tracker, range(first, last + 1))
        tracker.finish(timeout=120.0)
    (run,) = storage.get_run_records("tests")
    assert (run["name"], run["id"]) == (
        "mine",
        (tmp_path / "mine" / "trackio" / "run_id.txt").read_text().strip(),
    )
    logs = storage.get_logs("tests", "mine", run_id=run["id"])
    losses = [(row["step"], row["train/loss"]) for row in logs if "train/loss" in row]
    assert losses == [(step, 1 / step) for step in range(1, 9)]
    (histogram, *_) = [row[HISTOGRAM] for row in logs if "histograms" in str(row)]
    assert (histogram["values"], histogram["bins"]) == (COUNTS, EDGES)
    texts = [row["samples/text"]["_value"] for row in logs if "samples/text" in row]
    assert texts[-1] == "```\none <b>\n\n# 8\n```"
    config = storage.get_run_config("tests", "mine", run_id=run["id"])
    assert config["model.n_layer"] == 2
    assert [row["summary/eval/loss"] for row in logs if "summary/eval/loss" in row][-1] == 0.5


def test_missing_libraries_are_reported_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(availability._MODULES, "wandb", "no_such_library")
    message = r"no_such_library is not installed; pip install 'tjx-metrics\[wandb\]', or leave"
    for refused in (
        lambda: check_trackers(["tensorboard", "wandb"]),
        lambda: open_trackers(["wandb"], tmp_path),
        lambda: WandbTracker("id", directory=tmp_path, project="tests", name="a"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    with pytest.raises(ValueError, match="did you mean trackio"):
        open_trackers(["trackoi"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_registered_tracker_receives_records_and_is_recreated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[TrackedRun] = []
    logged: list[tuple[float, int]] = []

    class Failing(CompositeTracker):
        def log(self, metrics: Any, step: int) -> None:
            if len(made) == 1:
                raise OSError("connection lost")
            logged.append((metrics["train/loss"], step))

    def make(run: TrackedRun) -> Failing:
        made.append(run)
        return Failing([])

    monkeypatch.setitem(registration.registered_trackers, "mine", CompositeTracker)  # removed after
    register_tracker("mine", make)
    (tracker,) = open_trackers(["mine"], tmp_path, resume_step=4)
    tracker.log({"train/loss": 2.0}, 5)
    with pytest.warns(TrackerWarning, match="connection lost"):
        tracker.finish(timeout=60.0)
    assert logged == [(2.0, 5)]
    assert [(run.resume_step, run.recreated) for run in made] == [(4, False), (4, True)]
    with pytest.raises(ValueError, match=r"trackio, .*mine; add it with .*register_tracker"):
        check_trackers(["prometheus"])
    with pytest.raises(ValueError, match="not built in"):
        register_tracker("wandb", make)
