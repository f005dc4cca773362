"""The command ``tjx-ckpt``: list, verify, compare, export and import checkpoints."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tjx_ckpt.cli.checkpoint_diff import bytes_to_compare, compare_checkpoints
from tjx_ckpt.cli.command_line import make_parser, step_number
from tjx_ckpt.cli.diff_report import difference_json, difference_text
from tjx_ckpt.cli.listing import arrays_json, arrays_text, list_json, list_text
from tjx_ckpt.cli.orbax_exchange import export_orbax, import_orbax
from tjx_ckpt.cli.safetensors_export import export, plan_tensors
from tjx_ckpt.cli.terminal import Progress, human_bytes
from tjx_ckpt.cli.verify import bytes_to_verify, verify_json, verify_steps, verify_text
from tjx_ckpt.errors import CheckpointError, CorruptCheckpointError
from tjx_ckpt.lookup import Checkpoint, find_directory, newest, require
from tjx_core import printable
from tjx_core.command_line import EXIT_USAGE

_DAMAGED = 1
_DIFFERENT = 1
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line; by default that of the process.

    Returns
    -------
    int
        Exit code: 0 for success, 1 for damaged or different checkpoints, 2 for errors of the
        command line or the disk, 130 after Ctrl-C.
    """
    parsed = make_parser().parse_args(arguments)
    try:
        return _COMMANDS[parsed.command](parsed)
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED
    except CorruptCheckpointError as error:
        _print_error(error)
        # For diff, 1 means that both were read and are different.
        return EXIT_USAGE if parsed.command == "diff" else _DAMAGED
    except (
        CheckpointError,
        ValueError,
        OSError,
        ImportError,  # the backend of a URL is not installed
    ) as error:
        _print_error(error)
        return EXIT_USAGE


def _list(parsed: argparse.Namespace) -> int:
    storage = find_directory(parsed.directory)
    if parsed.step is not None and not parsed.arrays:
        raise ValueError("--step: expected only with --arrays; leave it out to list all steps")
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
    results = []
    with Progress("verified", bytes_to_verify(storage, steps)) as progress:
        for result in verify_steps(storage, steps, progress):
            results.append(result)
            if not parsed.json:
                progress.clear()
                _show(verify_text(result))
    quarantined = storage.quarantined()
    if parsed.json:
        _show(
            {
                "directory": str(storage),
                "checkpoints": [verify_json(result) for result in results],
                "set_aside": quarantined,
            }
        )
    elif not results:
        _show(f"no complete checkpoint in {storage}")
    if quarantined and not parsed.json:
        _show(f"renamed as damaged before: {', '.join(quarantined)}")
    return 0 if results and not any(result.problems for result in results) else _DAMAGED


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
                raise ValueError("--step, --other_step: expected only with two directories")
            storage = find_directory(directory)
            return Checkpoint(storage, step_number(step)), Checkpoint(
                storage, step_number(other_step)
            )
        case [directory, other_directory] if (
            not other_directory.isdecimal() or Path(other_directory).exists()
        ):
            storage, other = find_directory(directory), find_directory(other_directory)
            step = newest(storage) if parsed.step is None else parsed.step
            other_step = newest(other) if parsed.other_step is None else parsed.other_step
            return Checkpoint(storage, step), Checkpoint(other, other_step)
    raise ValueError(
        f"diff: got {' '.join(parsed.what)}; expected a directory and two of its steps, or two "
        "directories"
    )


def _export(parsed: argparse.Namespace) -> int:
    if parsed.format == "orbax" and parsed.separator != "/":
        raise ValueError(
            f"--separator: got {parsed.separator!r} with --format orbax; expected none, as Orbax "
            "stores nested dicts; leave it out"
        )
    storage = find_directory(parsed.directory)
    step = newest(storage) if parsed.step is None else parsed.step
    with Checkpoint(storage, step) as checkpoint:
        leaves = checkpoint.manifest.leaves
        tensors = plan_tensors(
            leaves, only=parsed.only, dtype=parsed.dtype, separator=parsed.separator
        )
        total = sum(leaves[tensor.key].size_bytes for tensor in tensors)
        with Progress("exported", total) as progress:
            if parsed.format == "orbax":
                _use_cpu()
                export_orbax(checkpoint, tensors, parsed.out, progress=progress)
                paths = [parsed.out]
            else:
                paths = export(
                    checkpoint, tensors, parsed.out,
                    max_shard_bytes=parsed.max_shard_size, progress=progress,
                )  # fmt: skip
    size = sum(tensor.spec.size_bytes for tensor in tensors)
    lines = [f"{checkpoint.name}: {len(tensors)} arrays, {human_bytes(size)}", *map(str, paths)]
    _show("\n".join(lines))
    return 0


def _import(parsed: argparse.Namespace) -> int:
    _use_cpu()
    step, count = import_orbax(parsed.orbax, parsed.out, step=parsed.step, only=parsed.only)
    _show(f"{parsed.out} step {step}: {count} arrays")
    return 0


def _use_cpu() -> None:
    """Keep JAX, which Orbax imports, from starting an accelerator."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _print_error(error: Exception) -> None:
    lines = printable(str(error)).splitlines() or [type(error).__name__]
    sys.stderr.write("".join(f"tjx-ckpt: {line}\n" for line in lines))


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
    "import": _import,
}


if __name__ == "__main__":
    sys.exit(main())
