"""Exit codes: expected errors have a code and one message, unexpected ones a traceback."""

import errno
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import tjx_ckpt
import tjx_data
import tjx_metrics
import tjx_trainer.main as program
from tjx_core import ConfigError
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime.exit_codes import EXIT_INFO, ExitCode, KernelError, NotFiniteError, table
from tjx_trainer.runtime.out_of_memory import OutOfMemoryError
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.runtime.run_logging import log_info
from tjx_trainer.training import preflight
from tjx_trainer.training.train import draw_loss

FULL = OSError(errno.ENOSPC, "No space left on device")
ERRORS = [
    (tjx_data.HubError("no network"), 2),
    (tjx_ckpt.DirectoryInUseError("process 7 on host saves there"), 2),
    (tjx_ckpt.MismatchError("blocks/up has another shape"), 2),
    (NotFiniteError(12, 5), 3),
    (tjx_ckpt.AllCheckpointsCorruptError("all are damaged", {3: ["array: 1 bit"]}), 4),
    (tjx_ckpt.SaveError(7, FULL), 5),
    (tjx_ckpt.ClaimError("run/checkpoints", OSError(errno.ENOLCK, "No locks available")), 5),
    (OSError(errno.EMFILE, "Too many open files"), 5),
    (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 5000), 2),
    (tjx_ckpt.UnreadableError("run/checkpoints/3", OSError(errno.EIO, "I/O error")), 11),
    (tjx_metrics.RecordError(Path("metrics.jsonl"), PermissionError(13, "not ours")), 5),
    (FULL, 5),
    (MemoryError("Unable to allocate 3 TiB"), 7),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), 7),
    (OutOfMemoryError("out of memory: 3 TiB"), 7),
    (tjx_data.DataError("train_00000.bin: missing"), 9),
    (KernelError("--model.attention_implementation: got cudnn"), 10),
    (BrokenProcessPool("a process was terminated abruptly"), 9),
]


@pytest.fixture
def train_raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Let training raise an error."""

    def use(error: BaseException) -> None:
        def train(config: Config, *, dry_run: bool, eval_only: bool) -> int:
            raise error

        monkeypatch.setitem(sys.modules, "tjx_trainer.training.train", SimpleNamespace(train=train))

    return use


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
def test_errors_that_users_meet_are_one_message_and_a_code(
    error: Exception,
    code: int,
    train_raises: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    error.add_note("a note that helps\x1b[31m")
    train_raises(error)
    assert program.main([]) == code
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert str(error).splitlines()[0] in printed
    assert "a note that helps\\x1b[31m" in printed  # no control characters on the terminal
    assert "Traceback" not in printed


def test_control_characters_of_names_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    log_info("run directory  \x1b[31mred")
    assert capsys.readouterr().err == "run directory  \\x1b[31mred\n"


def test_an_unexpected_error_keeps_its_traceback(
    train_raises: Callable[[BaseException], None],
) -> None:
    internal = jax.errors.JaxRuntimeError("INTERNAL: it broke")
    for error in (KeyError("blocks"), internal, OSError(errno.ENOENT, "no such file")):
        train_raises(error)
        with pytest.raises(type(error)) as caught:
            program.main([])
        assert caught.value is error


def test_a_configuration_that_does_not_fit_is_reported_as_a_list(
    train_raises: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    train_raises(ConfigError(["one", "two"]))
    with pytest.raises(SystemExit) as caught:
        program.main([])
    assert caught.value.code == ExitCode.USER_ERROR
    assert capsys.readouterr().err.startswith("2 mistakes")


def test_ctrl_c_is_no_traceback_at_any_moment() -> None:
    script = (
        "import os, signal, sys\n"
        "import tjx_trainer.main as program\n"
        "def parse(words):\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)  # nothing to save yet, and no reason to die\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    signal.pause()\n"
        "program.parse = parse\n"
        "sys.exit(program.main([]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": ":".join(str(Path(entry).resolve()) for entry in sys.path if entry)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == ExitCode.INTERRUPTED == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("interrupted")


def test_all_missing_requirements_are_reported_before_data_are_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("text")
    words = ["--data.path", str(text), "--checkpoint.directory", "s3://bucket/run"]

    def need_s3fs(_: str) -> list[int]:
        raise ImportError("install s3fs")

    monkeypatch.setattr(tjx_ckpt, "list_steps", need_s3fs)
    monkeypatch.setattr(preflight, "host_memory", lambda: 2**30)
    config = resolve([*words, "--train.batch_size", "20000000"])
    with pytest.raises(ConfigError) as caught:
        preflight.check_requirements(config)
    batch, checkpoints = (str(problem) for problem in caught.value.problems)
    assert batch.startswith("train.batch_size: got 20,000,000, whose batches")
    assert checkpoints == "--checkpoint.directory s3://bucket/run: install s3fs"


def test_a_platform_without_devices_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "default_backend", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ConfigError, match=r"JAX_PLATFORMS: got cuda; .* set JAX_PLATFORMS=cpu"):
        preflight.find_backend()


def test_a_loss_curve_that_cannot_be_drawn_is_reported(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.write_text("no records")
    assert draw_loss(run).startswith("none: ")
    assert draw_loss(RunDirectory(tmp_path / "gone")).startswith("none: FileNotFoundError")


def test_the_table_has_every_code() -> None:
    assert set(EXIT_INFO) == set(ExitCode)
    again = {int(code) for code, meaning in EXIT_INFO.items() if meaning.again}
    assert again == {1, 5, 6, 9, 11}  # 1 is Python's own for an unexpected error; these may pass
    assert all(f"| {code:d} |" in table() for code in ExitCode)
