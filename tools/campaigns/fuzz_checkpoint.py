"""Fuzzing of checkpoints: manifest, headers and content of the files."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import jax
import ml_dtypes  # noqa: F401  NumPy learns the names of its types
import numpy as np
from campaigns.fuzz_kind import Kind
from campaigns.fuzz_model import join, split
from campaigns.fuzz_mutations import (
    is_small_file,
    mutate_bytes,
    mutate_tree,
    render,
    spoil_file,
)

from tjx_ckpt import Checkpointer, CheckpointError
from tjx_ckpt.store.checksum import checksum
from tjx_ckpt.store.manifest import with_checksum

OLDER, NEWEST = 2, 3


def _state(step: int) -> dict[str, Any]:
    draws = np.random.default_rng(step)
    return {
        "params": {
            "w": draws.standard_normal((4, 8)).astype(np.float32),
            "b": draws.standard_normal(8).astype("bfloat16"),
        },
        "step": np.array(step, np.int32),
        "empty": np.zeros((0, 3), np.float32),
    }


def _leaves(state: Any) -> dict[str, np.ndarray]:
    flat, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


class CheckpointFolder(Kind):
    """Fuzz kind: the folder of a run's checkpoints."""

    name = "checkpoint"
    errors: ClassVar[tuple[type[BaseException], ...]] = (CheckpointError,)
    names_file: ClassVar[bool] = False

    def prepare(self, scratch: Path) -> None:
        """Save two valid checkpoints."""
        self._folder = scratch / "base"
        with Checkpointer(self._folder) as checkpointer:
            for step in (OLDER, NEWEST):
                checkpointer.save(
                    step, _state(step), metadata={"data": {"seed": 1}}, metrics={"eval/loss": 2.5}
                )
                checkpointer.wait()
        manifest = json.loads((self._folder / str(NEWEST) / "manifest.json").read_bytes())
        self._keys = set(manifest["content"]["leaves"])

    def build(self, steps: Sequence[Random], folder: Path) -> None:
        """Copy the checkpoints and mutate the newest, with or without updated checksums."""
        shutil.copytree(self._folder, folder / "run")
        place = folder / "run" / str(NEWEST)
        for step in steps:
            kind = step.random()
            if kind < 0.05:
                self._split_piece(place, step)
            elif kind < 0.5:
                self._change_manifest(place / "manifest.json", step)
            else:
                self._change_file(place, step)

    def _change_manifest(self, file: Path, random: Random) -> None:
        if not is_small_file(file):
            return
        if random.random() < 0.04:
            spoil_file(file, random)
            return
        try:
            whole = json.loads(file.read_bytes())
            content = mutate_tree(whole["content"], random)
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if random.random() < 0.8:  # an attacker can compute the checksum too
            try:
                file.write_bytes(with_checksum(content))
            except (RecursionError, ValueError):
                file.write_bytes(b"[" * 10**6)
        else:
            file.write_bytes(render({**whole, "content": content}, random))

    def _split_piece(self, place: Path, random: Random) -> None:
        """Store a leaf as two shards, adjacent or overlapping."""
        manifest = place / "manifest.json"
        if not is_small_file(manifest):
            return
        try:
            content = json.loads(manifest.read_bytes())["content"]
            for name, entry in content["files"].items():
                for at, (key, start, shape, size, digest) in enumerate(entry["pieces"]):
                    if shape and shape[0] % 2 == 0 and shape[0]:
                        half = [shape[0] // 2, *shape[1:]]
                        second = [start[0] + random.choice([0, half[0]]), *start[1:]]
                        entry["pieces"][at : at + 1] = [
                            [key, start, half, size // 2, digest],
                            [key, second, half, size // 2, digest],
                        ]
                        manifest.write_bytes(with_checksum(content))
                        self._mend_manifest(manifest, place / name)
                        return
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return

    def _change_file(self, place: Path, random: Random) -> None:
        files = [path for path in sorted(place.iterdir()) if is_small_file(path)]
        if not files:
            return
        file = random.choice(files)
        if random.random() < 0.06:
            spoil_file(file, random)
            return
        data = file.read_bytes()
        try:
            header, body = split(data)
            data = join(render(mutate_tree(header, random), random), body)
        except (ValueError, RecursionError):
            data = mutate_bytes(data, random)
        if random.random() < 0.4:
            data = mutate_bytes(file.read_bytes(), random)
        file.write_bytes(data)
        if random.random() < 0.5:
            self._mend_manifest(place / "manifest.json", file)

    def _mend_manifest(self, manifest: Path, file: Path) -> None:
        """Update the manifest entry of a file to its content."""
        if not is_small_file(manifest):
            return
        if not is_small_file(file):
            return
        try:
            content = json.loads(manifest.read_bytes())["content"]
            data = file.read_bytes()
            entry = content["files"][file.name]
            at = len(data) - sum(piece[3] for piece in entry["pieces"])
            entry["header"] = [at, checksum(data[:at])]
            for piece in entry["pieces"]:
                piece[4] = checksum(data[at : at + piece[3]])
                at += piece[3]
            manifest.write_bytes(with_checksum(content))
        except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError):
            return

    def check(self, folder: Path) -> None:
        """Verify and restore; the result must be the previous step, or the content of the files."""
        directory = folder / "run"
        expected = _assemble(directory / str(NEWEST))
        with Checkpointer(directory) as checkpointer:
            checkpointer.claim()
            problems = checkpointer.verify(NEWEST)
            assert all(isinstance(line, str) and line for line in problems)
            abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), _state(NEWEST))
            restored = _leaves(checkpointer.restore(abstract))
            if NEWEST in checkpointer.steps():
                assert not problems, f"restored in spite of {problems}"
                assert expected is not None, "restored, and the pieces do not make up the leaves"
                assert isinstance(checkpointer.metadata(NEWEST), dict)
                assert all(isinstance(v, float) for v in checkpointer.metrics(NEWEST).values())
            else:
                assert problems, "set aside without a reason"
                expected = _leaves(_state(OLDER))
            for key, leaf in restored.items():
                wanted = expected[key]
                assert leaf.dtype == wanted.dtype, key
                assert leaf.tobytes() == wanted.tobytes(), key


def _assemble(place: Path) -> dict[str, np.ndarray] | None:
    """Read the leaves by the manifest; return None if its shards are inconsistent."""
    files = {path.name: path for path in place.iterdir()}
    if not all(map(is_small_file, files.values())):
        return None
    try:
        content = json.loads((place / "manifest.json").read_bytes())["content"]
        found = {}
        seen = {}
        for key, (shape, dtype) in content["leaves"].items():
            if math.prod(shape) > 1 << 20:
                return None
            found[key], seen[key] = np.zeros(shape, dtype), np.zeros(shape, int)
        for name, entry in content["files"].items():
            data = files[name].read_bytes()  # a name such as /dev/zero has no end
            at = entry["header"][0]
            for key, start, shape, size, _ in entry["pieces"]:
                box: Any = (*(slice(s, s + n) for s, n in zip(start, shape, strict=True)), ...)
                found[key][box] = np.frombuffer(data[at : at + size], found[key].dtype).reshape(
                    shape
                )
                seen[key][box] += 1
                at += size
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, OSError):
        return None
    except (RecursionError, SyntaxError):  # a dtype with a number of more than 4,300 digits
        return None
    return found if all((count == 1).all() for count in seen.values()) else None
