"""Damages of a checkpoint, one file or folder at a time."""

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

MANIFEST = "manifest.json"


class NoDamageError(Exception):
    """The random damage would change nothing, or does not apply."""


def flip_bit(step: Path, draw: random.Random) -> list[str]:
    """Flip one bit of one file."""
    path = _draw_file(step, draw)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return _write(step, path, bytes(data))


def truncate(step: Path, draw: random.Random) -> list[str]:
    """Truncate one file, possibly to zero bytes."""
    path = _draw_file(step, draw)
    data = path.read_bytes()
    return _write(step, path, data[: draw.randrange(len(data))])


def append(step: Path, draw: random.Random) -> list[str]:
    """Append a few bytes to one file."""
    path = _draw_file(step, draw, empty=True)
    return _write(step, path, path.read_bytes() + draw.randbytes(draw.randint(1, 64)))


def remove(step: Path, draw: random.Random) -> list[str]:
    """Remove one file."""
    path = _draw_file(step, draw, empty=True)
    path.unlink()
    return [_name(step, path)]


def zero_range(step: Path, draw: random.Random) -> list[str]:
    """Zero a range of one file, as a lost page or block does."""
    path = _draw_file(step, draw)
    data = bytearray(path.read_bytes())
    begin = draw.randrange(len(data))
    end = min(len(data), begin + draw.choice((1, 16, 512, 4096)))
    data[begin:end] = bytes(end - begin)
    return _write(step, path, bytes(data))


def zero_file(step: Path, draw: random.Random) -> list[str]:
    """Zero one file and keep its size, as a crash does to an unflushed file."""
    path = _draw_file(step, draw)
    return _write(step, path, bytes(path.stat().st_size))


def swap_files(step: Path, draw: random.Random) -> list[str]:
    """Swap two files."""
    one, other = draw.sample(_files(step), 2)
    first, second = one.read_bytes(), other.read_bytes()
    return [*_write(step, one, second), *_write(step, other, first)]


def stale_manifest(step: Path, draw: random.Random) -> list[str]:
    """Replace the manifest by that of another step."""
    other = draw.choice(_others(step))
    return _write(step, step / MANIFEST, (other / MANIFEST).read_bytes())


def stale_file(step: Path, draw: random.Random) -> list[str]:
    """Replace a file by that of another step."""
    other = draw.choice(_others(step))
    same = [path for path in _files(step) if (other / _name(step, path)).is_file()]
    path = draw.choice([path for path in same if path.name != MANIFEST])
    return _write(step, path, (other / _name(step, path)).read_bytes())


def copied_folder(step: Path, draw: random.Random) -> list[str]:
    """Replace the checkpoint by a copy of another step."""
    other = draw.choice(_others(step))
    shutil.rmtree(step)
    shutil.copytree(other, step)
    return [MANIFEST]


def renamed_folder(step: Path, draw: random.Random) -> list[str]:
    """Rename the folder to the number of a later step."""
    step.rename(step.with_name(str(int(step.name) + draw.randint(1, 1000))))
    return [MANIFEST]


def emptied_folder(step: Path, draw: random.Random) -> list[str]:  # noqa: ARG001  as the others
    """Remove all files, as lost file system metadata does."""
    for path in _files(step):
        path.unlink()
    return [MANIFEST]


Damage = Callable[[Path, random.Random], list[str]]
"""Damages the folder of a step; returns the names of the files that are wrong then."""

DAMAGES: Mapping[str, Damage] = {
    "bit flip": flip_bit,
    "truncation": truncate,
    "appended bytes": append,
    "removal": remove,
    "zeroed range": zero_range,
    "zeroed file": zero_file,
    "two files swapped": swap_files,
    "manifest of another step": stale_manifest,
    "file of another step": stale_file,
    "folder of another step": copied_folder,
    "renamed folder": renamed_folder,
    "emptied folder": emptied_folder,
}


def _files(step: Path) -> list[Path]:
    return [path for path in sorted(step.rglob("*")) if path.is_file()]


def _draw_file(step: Path, draw: random.Random, *, empty: bool = False) -> Path:
    return draw.choice([path for path in _files(step) if empty or path.stat().st_size])


def _others(step: Path) -> list[Path]:
    steps = [path for path in sorted(step.parent.iterdir()) if path.name.isdecimal()]
    return [path for path in steps if path != step]


def _name(step: Path, path: Path) -> str:
    return path.relative_to(step).as_posix()


def _write(step: Path, path: Path, data: bytes) -> list[str]:
    if path.read_bytes() == data:
        raise NoDamageError
    path.write_bytes(data)
    return [_name(step, path)]
