"""Whether the checkpoints of a directory are sound, for the command."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tjx_ckpt.cli.terminal import human_bytes
from tjx_ckpt.store.manifest import ManifestError
from tjx_ckpt.store.manifest import read as read_manifest
from tjx_ckpt.store.storage import Storage
from tjx_ckpt.store.verification import problems


class VerifyResult(NamedTuple):
    """What was found out about a checkpoint.

    Attributes
    ----------
    step
        Which.
    files, size_bytes
        Of arrays, as its manifest says; 0 where that is damaged.
    problems
        One line for each bad file; none if it is sound.
    """

    step: int
    files: int
    size_bytes: int
    problems: tuple[str, ...]


def bytes_to_verify(storage: Storage, steps: Sequence[int]) -> int:
    """Return how many bytes `judge` will read."""
    return sum(_size(storage, step)[1] for step in steps)


def verify_steps(
    storage: Storage, steps: Sequence[int], progress: Callable[[int], None]
) -> Iterator[VerifyResult]:
    """Read every byte of checkpoints; leaves out one that its run deletes meanwhile."""
    for step in steps:
        files, size = _size(storage, step)
        found = problems(storage, step, progress=progress)
        if found and not storage.exists(step):
            continue
        yield VerifyResult(step, files, size, tuple(found))


def verify_text(verdict: VerifyResult) -> str:
    """Return a line, or one for each bad file."""
    if verdict.problems:
        return "\n".join([f"step {verdict.step}: damaged", *(f"  {p}" for p in verdict.problems)])
    word = "file" if verdict.files == 1 else "files"
    return f"step {verdict.step}: sound, {verdict.files} {word}, {human_bytes(verdict.size_bytes)}"


def verify_json(verdict: VerifyResult) -> dict[str, Any]:
    """Return a verdict as plain JSON."""
    return {
        "step": verdict.step,
        "sound": not verdict.problems,
        "problems": list(verdict.problems),
        "files": verdict.files,
        "size_bytes": verdict.size_bytes,
    }


def _size(storage: Storage, step: int) -> tuple[int, int]:
    try:
        manifest = read_manifest(storage, step)
    except ManifestError:
        return 0, 0
    return len(manifest.files), manifest.size_bytes
