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
from tjx_trainer.config.run_config import Config
from tjx_trainer.runtime.exit_codes import EXIT_INFO, ExitCode, KernelError, NotFiniteError, table
from tjx_trainer.runtime.out_of_memory import OutOfMemoryError

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
    error.add_note("a note that helps")
    train_raises(error)
    assert program.main([]) == code
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert str(error).splitlines()[0] in printed
    assert "a note that helps" in printed
    assert "Traceback" not in printed


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


def test_the_table_has_every_code() -> None:
    assert set(EXIT_INFO) == set(ExitCode)
    again = {int(code) for code, meaning in EXIT_INFO.items() if meaning.again}
    assert again == {1, 5, 6, 9, 11}  # 1 is Python's own for an unexpected error; these may pass
    assert all(f"| {code:d} |" in table() for code in ExitCode)
