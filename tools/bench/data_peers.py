"""Worker of the data benchmark for nanoGPT and Grain; see data.py."""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from turns import Json, serve


class NanoGPT:
    """Random windows as int64 torch tensors, as in the train.py of nanoGPT."""

    def __init__(self, file: str, batch: int, seq_len: int) -> None:
        import torch  # type: ignore[import-not-found]  # pants: no-infer-dep

        torch.set_num_threads(1)
        self._torch: Any = torch
        self._file, self._batch, self._seq_len = file, batch, seq_len
        self.version = torch.__version__

    def __call__(self) -> Any:
        """Read inputs and labels of a batch."""
        torch, length = self._torch, self._seq_len
        data = np.memmap(self._file, np.uint16, "r")  # reopened to avoid a memory leak
        places = torch.randint(len(data) - length, (self._batch,)).tolist()

        def windows(ahead: int) -> Any:
            rows = [data[i + ahead : i + ahead + length].astype(np.int64) for i in places]
            return torch.stack([torch.from_numpy(row) for row in rows])

        return windows(0), windows(1)


class _Windows:
    """Grain data source: windows of a token file."""

    def __init__(self, file: str, seq_len: int) -> None:
        self._data = np.asarray(np.memmap(file, np.uint16, "r"))
        self._seq_len = seq_len

    def __len__(self) -> int:
        return (len(self._data) - 1) // self._seq_len

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self._seq_len
        window = self._data[start : start + self._seq_len + 1].astype(np.int32)
        return {"tokens": window[:-1], "labels": window[1:]}


class Grain:
    """Shuffled Grain pipeline with `threads` prefetch threads; 0 disables prefetching."""

    def __init__(self, file: str, batch: int, seq_len: int, threads: int) -> None:
        import grain  # type: ignore[import-not-found]  # pants: no-infer-dep

        self.version = grain.__version__
        windows = grain.MapDataset.source(_Windows(file, seq_len)).shuffle(seed=0).repeat()
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16 if threads else 0)
        self._batches = iter(windows.batch(batch).to_iter_dataset(options))

    def __call__(self) -> Any:
        """Read inputs and labels of a batch."""
        return next(self._batches)


class Reading:
    """Worker that reads batches with one implementation."""

    _next: Callable[[], Any]

    def open(self, way: str, file: str, batch: int, seq_len: int) -> Json:
        """Select nanogpt, or grain followed by a number of threads."""
        if way == "nanogpt":
            reader: NanoGPT | Grain = NanoGPT(file, batch, seq_len)
        else:
            reader = Grain(file, batch, seq_len, int(way.removeprefix("grain")))
        self._next = reader
        for _ in range(20):
            self._next()
        return {"versions": {way: reader.version, "python": sys.version.split()[0]}}

    def run(self, batches: int) -> Json:
        """Read batches sequentially; return the seconds."""
        start = time.perf_counter()
        for _ in range(batches):
            self._next()
        return {"seconds": [(time.perf_counter() - start) / batches]}


if __name__ == "__main__":
    reading = Reading()
    serve({"open": reading.open, "run": reading.run})
