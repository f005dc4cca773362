"""Fault tolerance: a run with faults ends like a run without."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from one_device import one_device  # noqa: F401
from process_harness import (
    assert_alike,
    assert_each_stands_once,
    at,
    before_write,
    fill_disk,
    final_state,
    lines,
    records,
    run_attempt,
    send,
    steps,
    with_fault,
)
from small_text import flags_of_sheep

import tjx_ckpt
import tjx_ckpt.checkpointer
import tjx_metrics
from tjx_ckpt.store.local_folder import LocalFolder
from tjx_trainer import main as program
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.runtime.exit_codes import NotFiniteError
from tjx_trainer.runtime.signals import SignalHandler, StopSignal
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.training.build import Job, build_job
from tjx_trainer.training.run_manager import RunManager
from tjx_trainer.training.train_state import TrainState, shardings_of

TINY = """
--model.n_layer=1 --model.n_head=2 --model.d_model=16 --model.max_seq_len=16 --data.seq_len=16
--data.tokenizer=char --data.holdout=tail --train.max_steps=12 --train.batch_size=8
--train.eval_every=4 --train.eval_tokens=300 --train.sample_tokens=0 --log.every=1
--optimizer.learning_rate=1e-2 --schedule.warmup_steps=2 --checkpoint.every=5 --checkpoint.keep=9
--guard.max_skipped=3 --log.histograms_every=4 --log.layer_norms_every=3
""".split()  # noqa: SIM905  a list of words reads worse


# `with_fault` compiles the operations that damage a state in a step that the loop watches.
pytestmark = pytest.mark.filterwarnings("ignore:the training step was compiled again")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*TINY, *flags_of_sheep(tmp_path_factory.mktemp("data"))]


@pytest.fixture(autouse=True, scope="module")
def _no_plots() -> Iterator[None]:
    """Leave out the loss curve: drawing it takes longer than the steps of these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tjx_metrics, "plot_loss", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def job(words: list[str]) -> Job:
    """One job for all attempts of all runs: it is compiled and initialized once."""
    job = build_job(*open_task(resolve(words)))
    initial = jax.device_get(job.initial_state())

    class SharedJob(Job):
        def initial_state(self) -> TrainState:
            state: TrainState = jax.device_put(
                jax.tree.map(np.copy, initial), shardings_of(self.abstract)
            )
            return state

    return SharedJob(**{each.name: getattr(job, each.name) for each in dataclasses.fields(job)})


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to which nothing happened."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert run_attempt(job, path) == 0
    return path


@pytest.mark.parametrize(
    ("phase", "step", "nth", "saved"),
    [
        ("train", 2, 1, [3]),  # the step under way is finished, though 3 is not its turn
        ("evaluate", 0, 2, []),  # nothing is made yet
        ("evaluate", 4, 2, [4]),
        ("evaluate", 12, 1, [5, 10, 12]),
        ("save", 5, 1, [5, 6]),
        ("save", 12, 2, [5, 10, 12]),  # the last save is under way
    ],
)
def test_a_stop_saves_and_the_next_attempt_resumes(
    job: Job, whole: Path, tmp_path: Path, phase: str, step: int, nth: int, saved: list[int]
) -> None:
    path = tmp_path / "run"
    # A second SIGTERM changes nothing.
    with at(phase, step, send(signal.SIGTERM, signal.SIGTERM), nth=nth):
        code = run_attempt(job, path)
    assert code == 143
    assert steps(path) == saved
    if phase == "evaluate":  # one that was left stands nowhere
        assert not any("eval/loss" in line for line in lines(path) if line["step"] == step)
    assert run_attempt(job, path) == 0
    assert_alike(job, path, whole)


def test_the_evaluation_that_is_made_up_for_stands_once_after_a_crash(
    job: Job, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    with at("evaluate", 4, send(signal.SIGINT), nth=2):
        assert run_attempt(job, path) == 130

    def crash() -> None:
        raise SystemError("a bug")

    with at("train", 4, crash), pytest.raises(SystemError):
        run_attempt(job, path)
    assert sum("eval/loss" in line for line in lines(path)) == 2, "it was made up for"
    assert run_attempt(job, path) == 0
    assert_alike(job, path, whole)


def test_a_second_interrupt_ends_at_once_and_checkpoints_are_sound(
    job: Job, whole: Path, tmp_path: Path
) -> None:
    path, opened, disk = tmp_path / "run", [], threading.Event()

    class Opened(tjx_ckpt.Checkpointer):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            opened.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tjx_ckpt, "Checkpointer", Opened)
        before_write(patch, lambda _: disk.wait(60))
        with at("train", 7, send(signal.SIGINT, signal.SIGINT)), pytest.raises(KeyboardInterrupt):
            run_attempt(job, path)
        assert steps(path) == []  # it did not wait for the save of step 5
        disk.set()
        opened[0].close()  # as the end of the process does
    assert steps(path) == [5]
    assert run_attempt(job, path) == 0
    assert_alike(job, path, whole)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(
    job: Job, whole: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(whole, tmp_path / "run")
    kept = (path / "metrics.jsonl").read_bytes()
    for step in steps(path):
        (path / "checkpoints" / str(step)).rename(path / "checkpoints" / f"{step}.corrupt")
    with pytest.raises(tjx_ckpt.AllCheckpointsCorruptError, match=r"12\.corrupt"):
        run_attempt(job, path)
    shutil.rmtree(path / "checkpoints")  # as where its disk is not mounted
    with pytest.raises(tjx_ckpt.NoCheckpointError, match="records saves"):
        run_attempt(job, path)
    assert (path / "metrics.jsonl").read_bytes() == kept


def test_usr1_saves_and_continues(job: Job, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with at("train", 6, send(signal.SIGUSR1)):
        assert run_attempt(job, path) == 0
    assert steps(path) == [5, 7, 10, 12]
    assert_alike(job, path, whole)


def test_signals_end_with_the_block_and_come_back_to_whom_they_belonged() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with SignalHandler() as signal_handler:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert signal_handler.stop == signal.SIGINT
        # What has nothing to save is left at once, also for a signal that came before.
        with pytest.raises(StopSignal), signal_handler.interruptible():
            raise AssertionError
    with (
        SignalHandler() as signal_handler,
        signal_handler.interruptible(),
        pytest.raises(StopSignal),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in numbers] == before


def test_data_that_are_prepared_and_a_sample_are_left_at_once(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    short = ("--train.max_steps", "--train.sample_tokens", "--schedule.warmup_steps")
    given = [word for word in words if not word.startswith(short)]
    given += ["--train.max_steps=1", "--train.sample_tokens=4", "--schedule.warmup_steps=0"]
    given += [f"--run_dir={run_dir}"]
    with monkeypatch.context() as patch:
        patch.setattr("tjx_data.find_problems", lambda _: signal.raise_signal(signal.SIGTERM))
        assert program.main(given) == 143
    assert "run the same command to resume" in capsys.readouterr().err
    assert not run_dir.exists()

    with at("sample", 1, send(signal.SIGTERM)):
        assert program.main(given) == 143
    assert "a sample" not in capsys.readouterr().out
    assert steps(run_dir) == [1]
    assert program.main(given) == 0
    assert "a sample" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "back"),
    [
        ({9, 10, 11}, 5),  # that of step 10 was saved in the midst of them
        ({2, 3, 4}, 0),  # nothing was saved before
    ],
)
def test_a_fault_that_passes_leaves_no_trace(
    job: Job,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bad: set[int],
    back: int,
) -> None:
    path = tmp_path / "run"
    assert run_attempt(with_fault(job, bad, times=1), path) == 0
    assert f"3 steps in a row, up to step {max(bad)}" in (told := capsys.readouterr().err)
    assert f"restarting from step {back}\n" in told
    assert_alike(job, path, whole)


def test_a_run_that_diverges_by_itself_comes_to_the_same_place_and_ends(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    with pytest.raises(NotFiniteError) as ended:
        run_attempt(with_fault(job, {7, 8, 9}, times=9), path)
    assert ended.value.step == 9
    assert "restarting from step 5\n" in capsys.readouterr().err
    assert f"the last good checkpoint is step 5 in {path}" in ended.value.__notes__[0]
    assert_each_stands_once(path)
    # Another attempt can roll back again, and a shorter streak is only skipped.
    assert run_attempt(with_fault(job, {7, 8}, times=9), path) == 0
    skipped = [line["train/skipped"] for line in records(path) if "train/loss" in line]
    assert skipped[-1] == 2


def saving_each_step(job: Job, keep: int) -> Job:
    checkpoint = dataclasses.replace(job.config.checkpoint, every=1, keep=keep)
    return dataclasses.replace(job, config=dataclasses.replace(job.config, checkpoint=checkpoint))


def test_a_streak_takes_no_good_checkpoint(
    job: Job, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, often = tmp_path / "run", saving_each_step(job, keep=2)
    assert run_attempt(with_fault(often, {8, 9, 10}, times=1), path) == 0
    assert "restarting from step 7\n" in capsys.readouterr().err
    assert_alike(job, path, whole)
    # A run that is stopped in the midst of a streak is saved, and what was good stays.
    other = tmp_path / "other"
    with at("train", 9, send(signal.SIGTERM)):
        assert run_attempt(with_fault(often, {9, 10}, times=1), other) == 143
    assert steps(other) == [7, 8, 10]


def test_a_save_that_is_due_in_a_streak_is_made_after_it(job: Job, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with at("train", 8, send(signal.SIGTERM)):
        run_attempt(with_fault(job, {5, 6}, times=1), path)
    assert steps(path) == [7, 9]


def test_records_are_on_the_disk_before_a_checkpoint_counts(
    job: Job, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, flushed = tmp_path / "run", {}
    flush, commit = os.fsync, LocalFolder.commit

    def note_flush(descriptor: int) -> None:
        flush(descriptor)
        status = os.fstat(descriptor)
        flushed[status.st_ino] = status.st_size

    def check_records(folder: LocalFolder, step: int) -> None:
        metrics = path / "metrics.jsonl"
        on_disk = metrics.read_bytes()[: flushed[metrics.stat().st_ino]].decode()
        made = [json.loads(line)["step"] for line in on_disk.splitlines()]
        assert [n for n in range(1, step + 1) if n not in made] == []
        commit(folder, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", note_flush)
        patch.setattr(LocalFolder, "commit", check_records)
        with at("train", 5, send(signal.SIGTERM)):
            assert run_attempt(job, path) == 143
    assert steps(path) == [5, 6]
    assert "lacks" not in capsys.readouterr().err
    # A file system that loses flushed bytes all the same is reported.
    with (path / "metrics.jsonl").open("r+b") as file:
        file.truncate(len((path / "metrics.jsonl").read_bytes().splitlines()[0]) + 1)
    assert run_attempt(job, path) == 0
    assert "bytes of records up to step 6" in capsys.readouterr().err
    assert final_state(job, path) == final_state(job, whole)


def test_a_damaged_record_does_not_stop_a_run(job: Job, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with at("train", 7, send(signal.SIGTERM)):
        assert run_attempt(job, path) == 143
    damaged = (path / "metrics.jsonl").read_bytes() + b'\0\0\0\n{"step": 9}\n'
    (path / "metrics.jsonl").write_bytes(damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tjx_metrics.RecordWarning)
        assert run_attempt(job, path) == 0
    assert (path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert_alike(job, path, whole)


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, often = tmp_path / "run", saving_each_step(job, keep=2)

    def fail(_folder: LocalFolder, _step: int) -> None:
        raise OSError(errno.EBUSY, "busy")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFolder, "discard", fail)
        with at("train", 5, send(signal.SIGTERM)):
            assert run_attempt(often, path) == 143
    assert "cannot be deleted now" in caplog.text
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    # The next attempt applies `keep` again, before its first save.
    found: list[int] = []
    with at("train", 6, send(signal.SIGTERM)), at("save", 7, lambda: found.extend(steps(path))):
        assert run_attempt(often, path) == 143
    assert found[:2] == [5, 6]


def test_a_summary_that_cannot_be_written_does_not_fail_a_saved_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = object.__new__(RunManager)  # no more of it is used
    manager.summary = {"loss": 1.0}
    (tmp_path / "metrics.summary.json" / "in the way").mkdir(parents=True)
    tracker = tjx_metrics.JsonlTracker(tmp_path / "metrics.jsonl")
    manager._log_summary(tracker)
    tracker.finish()
    assert "the summary cannot be written: " in capsys.readouterr().err


def test_a_failed_save_ends_the_run_and_the_next_attempt_resumes(
    job: Job, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch, 10)
        with pytest.raises(tjx_ckpt.SaveError, match=r"step 10 failed.*No space"):
            run_attempt(job, path)
    assert steps(path) == [5]
    assert max(line["step"] for line in records(path)) <= 12
    assert run_attempt(job, path) == 0
    assert_alike(job, path, whole)


def test_with_on_error_continue_a_failed_save_is_logged_once_and_retried(
    job: Job, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = dataclasses.replace(job.config.checkpoint, on_error="continue")
    going_on = dataclasses.replace(
        job, config=dataclasses.replace(job.config, checkpoint=checkpoint)
    )
    path = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch, 5)
        assert run_attempt(going_on, path) == 0
    assert capsys.readouterr().err.count("the next save retries") == 1
    assert steps(path) == [10, 12]
    assert [line["checkpoint/failed"] for line in lines(path) if "checkpoint/failed" in line] == [1]
    assert_alike(job, path, whole)

    # What is saved last must be saved.
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch, 12)
        with pytest.raises(tjx_ckpt.SaveError, match="step 12"):
            run_attempt(going_on, tmp_path / "other")
    assert steps(tmp_path / "other") == [5, 10]


def test_a_checkpoint_knows_its_run_and_its_evaluation(job: Job, whole: Path) -> None:
    with tjx_ckpt.Checkpointer(whole / "checkpoints") as checkpointer:
        said = checkpointer.metadata(12)
        evaluated, between = checkpointer.metrics(12), checkpointer.metrics(5)
    assert said["config"]["model.d_model"] == 16
    assert len(said["config_sha256"]) == 64
    assert {"jax", "jaxlib", "tjx-nn"} <= said["versions"].keys()
    assert {"tokens", "seed"} & said["data"].keys()
    assert said["owes_evaluation"] is False
    last = [line for line in records(whole) if "eval/loss" in line][-1]
    assert evaluated["eval/loss"] == last["eval/loss"]
    assert between == {}
    saves = [line for line in lines(whole) if "checkpoint/bytes" in line]
    assert all(line["checkpoint/blocking_seconds"] >= 0 for line in saves)
    assert saves


def test_version_changes_are_logged_in_one_line(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    with at("train", 4, send(signal.SIGTERM)):
        run_attempt(job, path)
    monkeypatch.setattr(
        "tjx_trainer.runtime.provenance.versions", lambda: {"jax": "99.0", "numpy": "1"}
    )
    assert run_attempt(job, path) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "may differ in bits" in line]
    assert len(told) == 1
    assert f"jax {jax.__version__} -> 99.0: results may differ in bits" in told[0]
