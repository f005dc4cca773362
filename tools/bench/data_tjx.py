"""Worker of the data benchmark for tjx: open prepared sets and read batches; see data.py."""

import dataclasses
import re
import time
from pathlib import Path

import numpy as np
from turns import Json, serve

from tjx_data import (
    DataConfig,
    TokenLoader,
    byte_tokenizer,
    char_tokenizer,
    open_stream,
    prepare,
)
from tjx_data.prepared.index import (
    HEADER_BYTES,
    FileEntry,
    read_index,
    shard_header,
    write_index,
)


def make_set(folder: str, tokens_file: str | None, n_tokens: int, shard_tokens: int) -> Json:
    """Create a prepared set from a token file or, without one, from sparse files.

    Its hashes are wrong; the benchmark does not verify them.
    """
    directory = Path(folder)
    prepare(["a text", "b text"], char_tokenizer(["abtex "]), directory, holdout="tail")
    index = read_index(directory)
    tokens = None if tokens_file is None else np.memmap(tokens_file, np.uint16, "r")
    shards = []
    for number, first in enumerate(range(0, n_tokens, shard_tokens)):
        count = min(shard_tokens, n_tokens - first)
        file = directory / f"train_{number:05d}.bin"
        with file.open("wb") as stream:
            fingerprint = index.tokenizer_fingerprint
            stream.write(
                shard_header(token_bytes=2, first_token=first, tokenizer_fingerprint=fingerprint)
            )
            if tokens is not None:
                stream.write(tokens[first : first + count].tobytes())
            stream.truncate(HEADER_BYTES + 2 * count)
        shards.append(FileEntry(name=file.name, n_bytes=HEADER_BYTES + 2 * count, sha256="0" * 64))
    train = dataclasses.replace(index.splits["train"], n_tokens=n_tokens, shards=tuple(shards))
    splits = {**index.splits, "train": train}
    write_index(
        directory,
        dataclasses.replace(index, shard_tokens=shard_tokens, vocab_size=50257, splits=splits),
    )
    return {"shards": len(shards)}


class Reading:
    """Worker that reads batches of a prepared set."""

    def open(self, folder: str, batch: int, seq_len: int, step: int) -> Json:
        """Open a set and read the batch of a step; return both times and the peak memory."""
        before = _peak_mib()
        start = time.perf_counter()
        self._loader = TokenLoader(folder, seq_len=seq_len, batch_size=batch, seed=7)
        opened = time.perf_counter()
        found = self._loader.batch(step)
        read = time.perf_counter()
        assert found["tokens"].shape == (batch, seq_len)
        self._step = step
        return {
            "open_seconds": round(opened - start, 4),
            "first_batch_seconds": round(read - opened, 4),
            "mib": _peak_mib(),
            "mib_before": before,
            "versions": {"numpy": np.__version__},
        }

    def run(self, batches: int) -> Json:
        """Read batches sequentially; return the seconds."""
        start = time.perf_counter()
        for step in range(self._step, self._step + batches):
            self._loader.batch(step)
        self._step += batches
        return {"seconds": [(time.perf_counter() - start) / batches]}


def read_stream(file: str, cache: str, n_tokens: int) -> Json:
    """Read a stream of a JSONL file; return bytes (tokens) per second and the peak memory."""
    config = DataConfig(
        path=file, tokenizer="byte", stream=True, seq_len=256, cache_dir=cache, holdout="documents"
    )
    loader = open_stream(config, byte_tokenizer(), batch_size=16, seed=7)
    steps, start = n_tokens // (16 * 256), time.perf_counter()
    for step in range(steps):
        loader.batch(step)
    seconds = time.perf_counter() - start
    return {"tokens_per_sec": round(16 * 256 * steps / seconds), "mib": _peak_mib()}


def _peak_mib() -> float:
    """Return the peak resident memory of this process in MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return round(int(found[1]) / 1024, 1)


if __name__ == "__main__":
    reading = Reading()
    serve({"make": make_set, "open": reading.open, "run": reading.run, "stream": read_stream})
