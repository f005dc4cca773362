"""Subcommand ``verify``: checksums of the checkpoints of a directory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tjx_ckpt.cli.terminal import human_bytes
from tjx_ckpt.store.manifest import ManifestError
from tjx_ckpt.store.manifest import read as read_manifest
from tjx_ckpt.store.storage import Storage
from tjx_ckpt.store.verification import problems


class VerifyResult(NamedTuple):
    """Result of the verification of a checkpoint.

    Attributes
    ----------
    step
        Step of the checkpoint.
    files, size_bytes
        Number and size of its array files by the manifest; 0 if the manifest is damaged.
    problems
        A line for each bad file; empty if the checkpoint is intact.
    """

    step: int
    files: int
    size_bytes: int
    problems: tuple[str, ...]


def bytes_to_verify(storage: Storage, steps: Sequence[int]) -> int:
    """Return the number of bytes that `verify_steps` will read."""
    return sum(_size(storage, step)[1] for step in steps)


def verify_steps(
    storage: Storage, steps: Sequence[int], progress: Callable[[int], None]
) -> Iterator[VerifyResult]:
    """Read every byte of checkpoints; skip checkpoints that their run deletes meanwhile."""
    for step in steps:
        files, size = _size(storage, step)
        found = problems(storage, step, progress=progress)
        if found and not storage.exists(step):
            continue
        yield VerifyResult(step, files, size, tuple(found))


def verify_text(result: VerifyResult) -> str:
    """Return a report line, or a line for each bad file."""
    if result.problems:
        return "\n".join([f"step {result.step}: damaged", *(f"  {p}" for p in result.problems)])
    word = "file" if result.files == 1 else "files"
    return f"step {result.step}: intact, {result.files} {word}, {human_bytes(result.size_bytes)}"


def verify_json(result: VerifyResult) -> dict[str, Any]:
    """Return a result as plain JSON."""
    return {
        "step": result.step,
        "sound": not result.problems,
        "problems": list(result.problems),
        "files": result.files,
        "size_bytes": result.size_bytes,
    }


def _size(storage: Storage, step: int) -> tuple[int, int]:
    try:
        manifest = read_manifest(storage, step)
    except ManifestError:
        return 0, 0
    return len(manifest.files), manifest.size_bytes
