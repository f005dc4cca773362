"""The command ``tjx-ckpt``: look at checkpoints, check them, compare them, get weights out."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tjx_ckpt.cli.checkpoint_diff import bytes_to_compare, compare_checkpoints
from tjx_ckpt.cli.command_line import MISTAKE, parse, read_step, tell
from tjx_ckpt.cli.diff_report import difference_json, difference_text
from tjx_ckpt.cli.listing import arrays_json, arrays_text, list_json, list_text
from tjx_ckpt.cli.safetensors_export import export, plan_tensors
from tjx_ckpt.cli.terminal import Progress, human_bytes, printable
from tjx_ckpt.cli.verify import bytes_to_verify, verify_json, verify_steps, verify_text
from tjx_ckpt.errors import CheckpointError, CorruptCheckpointError
from tjx_ckpt.lookup import Checkpoint, find_directory, newest, require

_DAMAGED = 1
_DIFFERENT = 1
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status.

    0: as it should be; 1: damaged, or different; 2: a mistake of the user's, or the disk's.
    """
    parsed = parse(arguments)
    try:
        return _COMMANDS[parsed.command](parsed)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return MISTAKE
    except KeyboardInterrupt:
        return _INTERRUPTED
    except CorruptCheckpointError as error:
        tell(error)
        # For diff, 1 means that both were read and differ.
        return MISTAKE if parsed.command == "diff" else _DAMAGED
    except (
        CheckpointError,
        argparse.ArgumentTypeError,
        ValueError,
        OSError,
        ImportError,  # a URL needs what is not installed
    ) as error:
        tell(error)
        return MISTAKE


def _list(parsed: argparse.Namespace) -> int:
    storage = find_directory(parsed.directory)
    if parsed.step is not None and not parsed.arrays:
        raise ValueError("--step: belongs to --arrays; without it all steps are listed")
    if not parsed.arrays:
        _show(list_json(storage) if parsed.json else list_text(storage))
        return 0
    step = newest(storage) if parsed.step is None else parsed.step
    checkpoint = Checkpoint(storage, step)
    _show(arrays_json(checkpoint) if parsed.json else arrays_text(checkpoint))
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    storage = find_directory(parsed.directory)
    if parsed.step is not None:
        require(storage, parsed.step)
    steps = storage.steps() if parsed.step is None else [parsed.step]
    verdicts = []
    with Progress("verified", bytes_to_verify(storage, steps)) as progress:
        for verdict in verify_steps(storage, steps, progress):
            verdicts.append(verdict)
            if not parsed.json:
                progress.clear()
                _show(verify_text(verdict))
    aside = storage.quarantined()
    if parsed.json:
        _show(
            {
                "directory": str(storage),
                "checkpoints": [verify_json(verdict) for verdict in verdicts],
                "set_aside": aside,
            }
        )
    elif not verdicts:
        _show(f"no complete checkpoint in {storage}")
    if aside and not parsed.json:
        _show(f"set aside as damaged before: {', '.join(aside)}")
    return 0 if verdicts and not any(verdict.problems for verdict in verdicts) else _DAMAGED


def _diff(parsed: argparse.Namespace) -> int:
    first, second = _two_checkpoints(parsed)
    with (
        first,
        second,
        Progress("compared", bytes_to_compare(first, second, parsed.only)) as progress,
    ):
        difference = compare_checkpoints(
            first, second, only=parsed.only, stacked=parsed.stacked, progress=progress
        )
    if parsed.json:
        _show(difference_json(first, second, difference, top=parsed.top))
    else:
        _show(difference_text(first, second, difference, top=parsed.top, by_layer=parsed.layers))
    return 0 if difference.equal else _DIFFERENT


def _two_checkpoints(parsed: argparse.Namespace) -> tuple[Checkpoint, Checkpoint]:
    match parsed.what:
        case [directory, step, other_step]:
            if parsed.step is not None or parsed.other_step is not None:
                raise ValueError("--step and --other_step: belong to two directories")
            storage = find_directory(directory)
            return Checkpoint(storage, read_step(step)), Checkpoint(storage, read_step(other_step))
        case [directory, other_directory] if (
            not other_directory.isdecimal() or Path(other_directory).exists()
        ):
            storage, other = find_directory(directory), find_directory(other_directory)
            step = newest(storage) if parsed.step is None else parsed.step
            other_step = newest(other) if parsed.other_step is None else parsed.other_step
            return Checkpoint(storage, step), Checkpoint(other, other_step)
    raise ValueError(
        f"diff {' '.join(parsed.what)}: give a directory and two of its steps, or two directories"
    )


def _export(parsed: argparse.Namespace) -> int:
    storage = find_directory(parsed.directory)
    step = newest(storage) if parsed.step is None else parsed.step
    with Checkpoint(storage, step) as checkpoint:
        leaves = checkpoint.manifest.leaves
        tensors = plan_tensors(
            leaves, only=parsed.only, dtype=parsed.dtype, separator=parsed.separator
        )
        total = sum(leaves[tensor.key].size_bytes for tensor in tensors)
        with Progress("exported", total) as progress:
            paths = export(
                checkpoint, tensors, parsed.out,
                max_shard_bytes=parsed.max_shard_size, progress=progress,
            )  # fmt: skip
    size = sum(tensor.spec.size_bytes for tensor in tensors)
    lines = [f"{checkpoint.name}: {len(tensors)} arrays, {human_bytes(size)}", *map(str, paths)]
    _show("\n".join(lines))
    return 0


def _show(content: str | dict[str, Any]) -> None:
    if isinstance(content, str):
        text = printable(content)
    else:
        text = json.dumps(content, indent=2, allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "ls": _list,
    "verify": _verify,
    "diff": _diff,
    "export": _export,
}


if __name__ == "__main__":
    sys.exit(main())
