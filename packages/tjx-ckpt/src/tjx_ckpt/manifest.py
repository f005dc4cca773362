"""The manifest of a checkpoint: what it holds, and size and checksum of each of its files.

The array store underneath does not notice a flipped bit. The manifest does: it lists every file
with size and xxh3 checksum, and carries a checksum of its own text. The checksums find accidents,
not forgery: whoever can write the folder can write the manifest.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import xxhash

from tjx_ckpt.tree import LeafSpec

MANIFEST_NAME = "manifest.json"
_FORMAT = "tjx-ckpt/1"
_CHUNK_BYTES = 4 << 20


class ManifestError(Exception):
    """The manifest is missing, damaged or of an unknown format."""


class FileSpec(NamedTuple):
    """Size in bytes and xxh3-128 checksum (hexadecimal) of one file."""

    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes
    ----------
    step
        The training step that was saved.
    metadata
        What the caller gave to ``save``: any JSON.
    leaves
        Shape and dtype of each leaf of the state.
    files
        Size and checksum of each file, by its path relative to the checkpoint's folder.
    """

    step: int
    metadata: dict[str, Any]
    leaves: dict[str, LeafSpec]
    files: dict[str, FileSpec]


def plain_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``metadata`` exactly as it will read back from JSON.

    Raises
    ------
    ValueError
        If it holds something that JSON cannot express.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata must be plain JSON (str, number, list, dict): {error}"
        ) from None
    return copy


def describe_file(path: Path) -> FileSpec:
    """Return size and checksum of a file, reading it once in pieces."""
    digest = xxhash.xxh3_128()
    size = 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileSpec(size, digest.hexdigest())


def describe_files(folder: Path) -> dict[str, FileSpec]:
    """Return size and checksum of each file below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): describe_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into ``folder``, flushed to the disk."""
    with (folder / MANIFEST_NAME).open("x", encoding="utf-8") as file:
        file.write(_render({"format": _FORMAT, **asdict(manifest)}))
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> Manifest:
    """Read a manifest and check it against its own checksum.

    Raises
    ------
    ManifestError
        If it is missing, damaged or of an unknown format.
    """
    try:
        text = (folder / MANIFEST_NAME).read_bytes().decode("utf-8")
        content = json.loads(text)["content"]
    except FileNotFoundError:
        raise ManifestError("missing") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ManifestError(f"unreadable ({type(error).__name__})") from None
    # Rendering anew finds any changed byte: in the content, in the checksum, between them.
    if _render(content) != text:
        raise ManifestError("checksum differs")
    try:
        if content["format"] != _FORMAT:
            raise ManifestError(f"format {content['format']!r} is unknown; this is {_FORMAT!r}")
        return Manifest(
            step=int(content["step"]),
            metadata=dict(content["metadata"]),
            leaves={
                str(key): LeafSpec(tuple(int(size) for size in shape), str(dtype))
                for key, (shape, dtype) in content["leaves"].items()
            },
            files={
                str(name): FileSpec(int(size), str(checksum))
                for name, (size, checksum) in content["files"].items()
            },
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ManifestError(f"unreadable ({type(error).__name__}: {error})") from None


def problems(folder: Path, step: int) -> list[str]:
    """Return one line for each bad file of the checkpoint in ``folder``; none if it is sound.

    Parameters
    ----------
    folder
        The checkpoint's folder.
    step
        The step that the folder's name announces.
    """
    try:
        manifest = read(folder)
    except ManifestError as error:
        return [f"{MANIFEST_NAME}: {error}"]
    if manifest.step != step:
        return [f"{MANIFEST_NAME}: belongs to step {manifest.step}"]
    return [
        f"{name}: {problem}"
        for name, expected in sorted(manifest.files.items())
        if (problem := _file_problem(folder, name, expected))
    ]


def _file_problem(folder: Path, name: str, expected: FileSpec) -> str | None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return "lies outside the checkpoint"
    path = folder / relative
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"has {size} bytes, expected {expected.size}"
        if describe_file(path) != expected:
            return "checksum differs"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable ({error})"
    return None


def _render(content: Any) -> str:
    body = json.dumps(content, sort_keys=True, ensure_ascii=True)
    checksum = xxhash.xxh3_128_hexdigest(body.encode())
    return f'{{"checksum": "{checksum}", "content": {body}}}\n'
