"""The command `tjx-ckpt`: ls, verify, errors, and independence of JAX."""

import fcntl
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tjx_ckpt import Checkpointer
from tjx_ckpt.cli import listing, terminal
from tjx_ckpt.cli.verify import verify_steps
from tjx_ckpt.main import main
from tjx_ckpt.store import manifest, writer_lock
from tjx_ckpt.store.backends import open_storage
from tjx_ckpt.store.manifest import Manifest
from tjx_ckpt.store.storage import Storage
from tjx_ckpt.store.writer_lock import WriterLock
from tjx_core.command_line import EXIT_USAGE

LONG = "a_long_name_of_a_module"


def state(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    tree = {
        "params": {
            "blocks": {"kernel": rng.standard_normal((3, 4, 5)).astype(np.float32)},
            "wte": rng.standard_normal((7, 4)).astype(np.float32),
        },
        "opt_state": {LONG: {LONG: {LONG: {LONG: {LONG: np.zeros(2, np.float32)}}}}},
        "step": np.int32(step),
    }
    placed: dict[str, Any] = jax.device_put(tree)
    return placed


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with steps 9, 10 and 100."""
    directory = tmp_path_factory.mktemp("pristine")
    with Checkpointer(directory / "checkpoints") as checkpointer:
        for step in (9, 10, 100):
            metrics = {f"eval/{name}": step / 8 for name in ("accuracy", "loss")}
            metrics |= {f"eval/metric_{number}": float("nan") for number in range(9)}
            checkpointer.save(step, state(step), metadata={"seed": step}, metrics=metrics)
    return directory


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    copied: Path = shutil.copytree(pristine, tmp_path / "run")
    return copied


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        code: Any = main([str(word) for word in words])
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.startswith("  ")]


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_ls_shows_steps_by_number_with_size_parameters_and_metrics(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As after a clock jump: the newest step has the oldest time.
    os.utime(run / "checkpoints" / "100" / "manifest.json", (86400, 86400))
    code, text, _ = call(capsys, "ls", run)
    assert code == 0
    assert [row[0] for row in rows(text)[:4]] == ["step", "9", "10", "100"]
    assert "eval/loss" in rows(text)[0]
    size = sum(path.stat().st_size for path in (run / "checkpoints" / "9").glob("*.safetensors"))
    for row, step in zip(rows(text)[1:4], (9, 10, 100), strict=True):
        assert row[1:3] == [str(size), "B"]
        assert str(3 * 4 * 5 + 7 * 4) in row  # elements below params, not of the optimizer
        assert f"{step / 8:#.4g}" in row
    assert "1970-01-0" in text
    assert max(map(len, text.splitlines()[1:])) <= 100  # the title has the directory


def test_ls_accepts_a_run_directory_a_checkpoint_directory_and_a_url(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def listed(place: object) -> list[dict[str, Any]]:
        code, text, _ = call(capsys, "ls", place, "--json")
        assert code == 0
        found: list[dict[str, Any]] = json.loads(text)["checkpoints"]
        assert all(entry.pop("written") for entry in found if "memory" not in str(place))
        return found

    of_run = listed(run)
    assert of_run == listed(run / "checkpoints")
    assert [entry["metrics"]["eval/loss"] for entry in of_run] == [9 / 8, 10 / 8, 100 / 8]
    assert float(of_run[0]["metrics"]["eval/metric_0"]) != 0  # NaN, in valid JSON

    with Checkpointer("memory://ls/run/checkpoints") as checkpointer:
        checkpointer.save(10, state(10), metrics=of_run[1]["metrics"])
    (remote,) = listed("memory://ls/run")
    assert remote.pop("written") is None
    assert remote == of_run[1]


def test_ls_lists_damaged_and_renamed_checkpoints_leftovers_and_the_writer(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run / "checkpoints"
    flip_bit(directory / "10" / "manifest.json")
    (directory / "9").rename(directory / "9.corrupt")
    (directory / "11.tmp").mkdir()
    _, text, _ = call(capsys, "ls", run)
    assert "step 10: manifest.json: " in text
    assert "9.corrupt" in text
    assert "11.tmp" in text
    assert "current writer" not in text  # .writer names the last writer, which has exited

    lock_of_a_run = WriterLock(directory)
    assert lock_of_a_run.acquire()
    code, text, _ = call(capsys, "ls", run)
    assert code == 0
    assert f"current writer\n  process {os.getpid()} on " in text
    assert json.loads(call(capsys, "ls", run, "--json")[1])["writer"].startswith("process")
    lock_of_a_run.release()


def test_ls_skips_checkpoints_that_are_deleted_meanwhile(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_late(storage: Storage, step: int) -> Manifest:
        if step == 9:
            storage.discard(9)
        return manifest.read(storage, step)

    monkeypatch.setattr(listing, "read_manifest", read_late)
    code, text, _ = call(capsys, "ls", run)
    assert code == 0
    assert "damaged" not in text
    assert [row[0] for row in rows(text)[:3]] == ["step", "10", "100"]


def test_checking_a_lock_does_not_prevent_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".writer").touch()
    looking = (tmp_path / ".writer").open("rb")  # closed while the lock is taken
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(writer_lock, "time", types.SimpleNamespace(sleep=lambda _: looking.close()))
    taken = WriterLock(tmp_path)
    assert taken.acquire()
    taken.release()


def test_ls_arrays_lists_each_array_in_the_order_of_the_model(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = call(capsys, "ls", run, "--arrays", "--step", 10)
    assert code == 0
    assert "step 10: 4 arrays" in text
    assert ["params/blocks/kernel", "[3,4,5]", "float32", "240", "B"] in rows(text)
    assert max(map(len, text.splitlines()[1:])) <= 100  # the title has the directory

    listed = json.loads(call(capsys, "ls", run, "--arrays", "--json")[1])
    assert listed["step"] == 100
    assert [array["key"] for array in listed["arrays"]] == [
        "/".join(["opt_state", *[LONG] * 5]), "params/blocks/kernel", "params/wte", "step",
    ]  # fmt: skip


def test_verify_reports_the_damaged_step_and_file_only(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = call(capsys, "verify", run)
    assert code == 0
    assert text.count("intact") == 3

    flip_bit(run / "checkpoints" / "10" / "params-00000.safetensors")
    (run / "checkpoints" / "10" / "state-00000.safetensors").unlink()
    code, text, _ = call(capsys, "verify", run)
    assert code == 1
    assert text.count("intact") == 2
    assert "step 10: damaged\n  params-00000.safetensors: " in text
    assert "\n  state-00000.safetensors: missing" in text
    assert call(capsys, "verify", run, "--step", 9)[0] == 0
    code, text, _ = call(capsys, "verify", run, "--step", 10, "--json")
    assert code == 1
    (verdict,) = json.loads(text)["checkpoints"]
    assert not verdict["sound"]
    assert len(verdict["problems"]) == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN", 0.0)
    assert call(capsys, "verify", run)[2] == ""  # a log file gets none of it
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    call(capsys, "verify", run)
    shown = screen.getvalue().split("\r")
    assert any(re.match(r"verified: .* kB of 2.4 kB, \d+ %", line) for line in shown)
    assert shown[-1] == ""  # gone at the end
    assert not shown[-2].strip()


def test_verify_fails_if_all_checkpoints_were_renamed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (9, 10, 100):
        (run / "checkpoints" / str(step)).rename(run / "checkpoints" / f"{step}.corrupt")
    code, text, _ = call(capsys, "verify", run)
    assert code == 1
    assert "100.corrupt" in text


def test_a_checkpoint_that_is_deleted_meanwhile_is_not_damaged(run: Path) -> None:
    storage = open_storage(run / "checkpoints")

    def prune(size: int) -> None:
        if storage.exists(10):
            storage.discard(10)

    assert [
        (verdict.step, verdict.problems) for verdict in verify_steps(storage, [9, 10], prune)
    ] == [(9, ())]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ls", "nowhere"], "no such directory"),
        (["ls", "empty"], "no checkpoint in empty or empty/checkpoints"),
        (["verify", "torch.pt"], "torch.pt: got a file"),
        (["ls", "run/checkpoints/10"], "pass the directory that contains it"),
        (["ls", "nosuchstore://x"], "nosuchstore"),
        (["ls", "run", "--step", "9"], "--step: expected only with --arrays"),
        (["ls", "run", "--arrays", "--step", "11"], "no checkpoint of step 11 in"),
        (["verify", "run", "--step", "11"], "existing: 9, 10, 100"),
        (["verify", "run", "--step", "ten"], "got 'ten'; expected a whole number"),
        (["diff", "run", "9"], "expected a directory and two of its steps"),
        (["diff", "run", "9", "ten"], "got 'ten'; expected a whole number"),
        (["diff", "run", "9", "11"], "no checkpoint of step 11"),
        (["diff", "run", "9", "10", "--only", "parms"], "expected opt_state, params, step"),
        (["diff", "run", "9", "10", "--other_step", "9"], "expected only with two directories"),
        (["diff", "run", "9", "10", "--top", "0"], "at least 1"),
        (["export", "run", "--out", "weights.pt"], "got weights.pt; expected a file .safetensors"),
        (["export", "run", "--out", "no/w.safetensors"], "in an existing folder"),
        (
            ["export", "run", "--out", "w.safetensors", "--only", "x"],
            "--only: got x, which has no arrays",
        ),
        (["export", "run", "--out", "w.safetensors", "--max_shard_size", "big"], "try 5GB"),
        (["export", "run", "--out", "w.safetensors", "--dtype", "int8"], "bfloat16"),
        (["ls", "run", "--jsn"], "--jsn"),
        ([], "COMMAND"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    words: list[str],
    expected: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(run.parent)
    Path("empty").mkdir()
    Path("torch.pt").write_bytes(pickle.dumps({"w": 1}))
    before = sorted(run.parent.rglob("*"))
    code, out, error = call(capsys, *words)
    assert (code, out) == (EXIT_USAGE, "")
    first, *rest = error.splitlines()
    assert first.startswith("tjx-ckpt: ")
    assert expected in first
    assert all("--help` lists every flag" in line for line in rest)
    assert sorted(run.parent.rglob("*")) == before


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_in_place_of_any_file_is_damage_and_is_not_executed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "unpickled"
    trap = pickle.dumps(Trap(mark))
    for name in ("manifest.json", "params-00000.safetensors"):
        path = run / "checkpoints" / "10" / name
        intact = path.read_bytes()
        path.write_bytes(trap)
        code, text, _ = call(capsys, "verify", run, "--step", 10)
        assert code == 1
        assert name in text
        assert call(capsys, "ls", run)[0] == 0
        code, _, error = call(
            capsys, "export", run, "--step", 10, "--out", tmp_path / "a.safetensors"
        )
        assert code == 1
        assert "checkpoint of step 10 is damaged" in error
        path.write_bytes(intact)
    assert not mark.exists()


PROGRAM = """
import sys
from tjx_ckpt.main import main
run, out = sys.argv[1:]
codes = [
    main(words)
    for words in (
        ["ls", run], ["ls", run, "--arrays"], ["verify", run], ["diff", run, "9", "10"],
        ["export", run, "--out", out],
    )
]
assert codes == [0, 0, 0, 1, 0], codes
assert "jax" not in sys.modules
"""


def test_the_command_needs_no_jax(run: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-c", PROGRAM, str(run), str(tmp_path / "all.safetensors")]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_not_an_error(run: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    program = [sys.executable, "-m", "tjx_ckpt.main", "ls", str(run)]
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == ""


def test_the_command_does_not_modify_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "101.tmp").mkdir()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for words in (["ls", run], ["verify", run], ["diff", run, 9, 100]):
        call(capsys, *words)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
