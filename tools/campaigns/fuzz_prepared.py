"""Fuzzing of prepared sets: index, shards and other files."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from campaigns.fuzz_kind import Kind
from campaigns.fuzz_mutations import (
    draws,
    is_small_file,
    mutate_bytes,
    mutate_tree,
    render,
    spoil_file,
)

from tjx_data import TokenLoader, char_tokenizer, prepare
from tjx_data.prepared.index import HEADER_BYTES, read_index
from tjx_data.prepared.inspection import describe, verify
from tjx_data.prepared.packing import open_packing, packing_file

SEQ_LEN = 16


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Return an index with its hash recomputed, as an attacker can."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    try:
        canonical = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode("ascii")
    except (RecursionError, TypeError):
        return content
    return {**rest, "sha256": hashlib.sha256(canonical).hexdigest()}


class PreparedSet(Kind):
    """Fuzz kind: a folder written by `tjx_data.prepare`."""

    name = "prepared_set"

    def prepare(self, scratch: Path) -> None:
        """Prepare a small set of several shards, with packing."""
        words = draws("words")
        documents = [
            " ".join(words.choices(["over", "the", "wall", "they", "run"], k=words.randint(5, 30)))
            for _ in range(100)
        ]
        self._folder = scratch / "base"
        tokenizer = char_tokenizer(documents, ("<|endoftext|>",))
        with ThreadPoolExecutor(1) as one:
            prepare(documents, tokenizer, self._folder, shard_tokens=700, executor=one)
        for split in ("train", "validation"):
            open_packing(self._folder, split, SEQ_LEN)

    def build(self, steps: Sequence[Random], folder: Path) -> None:
        """Copy the set and mutate the index or another file, with or without updated hashes."""
        shutil.copytree(self._folder, folder / "set")
        for step in steps:
            if step.random() < 0.5:
                self._change_index(folder / "set", step)
            else:
                self._change_file(folder / "set", step)

    def _change_index(self, folder: Path, random: Random) -> None:
        file = folder / "index.json"
        if not is_small_file(file):
            return
        try:
            index = json.loads(file.read_bytes())
        except (ValueError, OSError, RecursionError):
            return
        index = mutate_tree(index, random)
        if isinstance(index, dict) and random.random() < 0.85:
            index = seal(index)
        file.write_bytes(render(index, random))

    def _change_file(self, folder: Path, random: Random) -> None:
        files = [path for path in sorted(folder.iterdir()) if is_small_file(path)]
        if not files:
            return
        file = random.choice(files)
        if random.random() < 0.07:
            spoil_file(file, random)
            return
        file.write_bytes(mutate_bytes(file.read_bytes(), random))
        if random.random() < 0.7:
            self._mend_index(folder, file)

    def _mend_index(self, folder: Path, file: Path) -> None:
        """Update the index entry of a file to its content."""
        place = folder / "index.json"
        if not is_small_file(place):
            return
        try:
            index = json.loads(place.read_bytes())
            entries = [index["tokenizer"]]
            for split in index["splits"].values():
                entries += [*split["shards"], split["starts"]]
            for entry in entries:
                if entry["name"] == file.name:
                    content = file.read_bytes()
                    entry |= {
                        "n_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()
                    }  # fmt: skip
            place.write_bytes(json.dumps(seal(index)).encode())
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            return

    def check(self, folder: Path) -> None:
        """Describe and verify the set, and compare batches of both packings with the shards."""
        place = folder / "set"
        index = read_index(place)
        verify(place)
        assert describe(place)
        for split in ("train", "validation"):
            stream = [
                np.frombuffer((place / entry.name).read_bytes()[HEADER_BYTES:], index.dtype)
                for entry in index.splits[split].shards
            ]
            tokens = np.concatenate(stream)
            assert len(tokens) == index.splits[split].n_tokens
            for packing in ("windows", "documents"):
                loader = TokenLoader(
                    place, split=split, seq_len=SEQ_LEN, batch_size=4, packing=packing
                )
                batches = [loader.batch(0), *loader.evaluation_batches(200)]
                _check_rows(batches, tokens)
            for number in range(min(loader.n_documents, 50)):
                loader.document(number)
        if packing_file(place, "train", SEQ_LEN).exists():
            open_packing(place, "train", SEQ_LEN)


def _check_rows(batches: list[dict[str, Any]], tokens: np.ndarray) -> None:
    """Check that each segment of a row is in the stream, with its labels after it."""
    stream = tokens.astype("<i4").tobytes()
    for batch in batches:
        segments = batch.get("segment_ids", np.ones_like(batch["tokens"]))
        for row, labels, segment in zip(batch["tokens"], batch["labels"], segments, strict=True):
            for number in np.unique(segment[segment > 0]):
                inside = (segment == number) & (labels != -100)
                if inside.any():
                    wanted = np.append(row[inside], labels[inside][-1]).astype("<i4").tobytes()
                    assert stream.find(wanted) >= 0, "a row that is not in the shards"
