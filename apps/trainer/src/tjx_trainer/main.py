"""Entry point of the trainer: train, plan, parameters, sweep, predict, pipeline."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import NoReturn

from tjx_ckpt.errors import (
    AllCheckpointsCorruptError,
    CheckpointError,
    ClaimError,
    SaveError,
    StorageError,
    UnreadableError,
    advice,
)
from tjx_core import ConfigError, printable
from tjx_data.corpora.hub import HubError
from tjx_data.errors import DataError
from tjx_metrics.errors import RecordError
from tjx_trainer.cli.arguments import parse_args
from tjx_trainer.cli.command_line import check_paths, exit_with_errors, format_errors, parse
from tjx_trainer.cli.help_page import HELP_FLAGS, nanogpt_help_text
from tjx_trainer.cli.nanogpt import translate
from tjx_trainer.pipeline import pipeline_command
from tjx_trainer.planning import parameter_table, plan_command
from tjx_trainer.runtime.exit_codes import ExactError, ExitCode, KernelError, NotFiniteError
from tjx_trainer.runtime.out_of_memory import explain, is_out_of_memory
from tjx_trainer.runtime.supervisor_client import connect, send_exit_reason
from tjx_trainer.runtime.xla_flags import request_determinism, request_reproducibility, set_flags
from tjx_trainer.scaling import predict_command
from tjx_trainer.sweep import sweep_command

# Errors of a disk that is full, failing, read-only or gone, and of exhausted files or locks.
_NOT_WRITTEN = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES,
    errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOLCK, errno.EBUSY, errno.ETIMEDOUT,
}  # fmt: skip

# Subcommands.
_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "plan": plan_command.run,
    "parameters": parameter_table.run,
    "sweep": sweep_command.run,
    "predict": predict_command.run,
    "pipeline": pipeline_command.run,
}

# The first matching class decides.
_CODES: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (HubError, ExitCode.USER_ERROR),
    (DataError, ExitCode.DATA_DAMAGED),
    (BrokenProcessPool, ExitCode.DATA_DAMAGED),  # a data preparation process died
    (AllCheckpointsCorruptError, ExitCode.CHECKPOINTS_DAMAGED),
    (UnreadableError, ExitCode.NOT_READ),
    (ClaimError, ExitCode.NOT_WRITTEN),
    (SaveError, ExitCode.NOT_WRITTEN),
    (StorageError, ExitCode.NOT_WRITTEN),
    (RecordError, ExitCode.NOT_WRITTEN),
    (CheckpointError, ExitCode.USER_ERROR),
    (NotFiniteError, ExitCode.NOT_FINITE),
    (KernelError, ExitCode.KERNEL_FAILED),
    (ExactError, ExitCode.USER_ERROR),
    (KeyboardInterrupt, ExitCode.INTERRUPTED),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer with the given arguments.

    Parameters
    ----------
    argv : sequence of str, optional
        By default those of the process.

    Returns
    -------
    int
        The exit code; see `tjx_trainer.runtime.exit_codes`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _COMMANDS:
        return _COMMANDS[words[0]](words[1:])
    # SIGUSR1 requests a save; ignore it until training starts.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    connect()
    try:
        if translate.MODE in words:
            if HELP_FLAGS & set(words):
                sys.stdout.write(nanogpt_help_text())
                return ExitCode.FINISHED
            words = _read_nanogpt(words)
        config = parse(words)
        check_paths(config)
        flags = parse_args(words)
        if flags.supervise and not (flags.dry_run or flags.eval_only):
            from tjx_trainer.runtime.supervisor import supervise

            return supervise(words, config)
        set_flags()
        if config.train.deterministic:
            request_determinism()
        if config.train.reproducible == "mesh":
            request_reproducibility()
        # Import JAX, which takes seconds, only after the command line is valid.
        from tjx_trainer.training.train import train

        return train(config, dry_run=flags.dry_run, eval_only=flags.eval_only)
    except ConfigError as error:
        send_exit_reason(format_errors(error))
        exit_with_errors(error)
    except SystemExit:
        raise
    except BaseException as error:
        code = code_of(error)
        if code is ExitCode.UNEXPECTED:
            send_exit_reason("".join(traceback.format_exception(error)))
            raise
        message = message_of(error)
        send_exit_reason(message)
        with suppress(OSError):  # stderr may be closed
            sys.stderr.write(printable(message))
        return code


def _read_nanogpt(words: Sequence[str]) -> list[str]:
    """Translate nanoGPT's arguments to the trainer's, and print notes on differences."""
    translation = translate.translate(words)
    translate.check_device(translation.environment)
    os.environ.update(translation.environment)  # before JAX is imported
    sys.stderr.write("".join(f"note           {note}\n" for note in translation.notes))
    return translation.words


def code_of(error: BaseException) -> ExitCode:
    """Return the exit code of an error; `ExitCode.UNEXPECTED` for unknown errors."""
    if is_out_of_memory(error):
        return ExitCode.OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno in _NOT_WRITTEN:
        return ExitCode.NOT_WRITTEN
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return ExitCode.USER_ERROR  # tjx's own file names are short
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.UNEXPECTED)


def message_of(error: BaseException) -> str:
    """Return the message of an expected error, with advice."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; earlier checkpoints are valid\n"
    text = explain(error) if is_out_of_memory(error) else str(error)
    hint = [advice(error)] if isinstance(error, OSError) and advice(error) else []
    return "; ".join([f"error: {text}", *hint, *getattr(error, "__notes__", [])]) + "\n"


def run() -> NoReturn:
    """Run the program and exit with its exit code."""
    code = main()
    if code == ExitCode.INTERRUPTED:
        # After a second Ctrl-C do not wait for the save in progress; after one it is complete.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
