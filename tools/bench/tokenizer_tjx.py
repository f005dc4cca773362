"""Worker of the tokenizer benchmark for tjx and the tokenizers library; see tokenizer.py."""

import array
import hashlib
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from turns import Json, serve

from tjx_data import Tokenizer, load_files, prepare

POLL_SECONDS = 0.02


class Encoding:
    """Worker that encodes documents with the GPT-2 vocabulary.

    Parameters
    ----------
    way
        "tjx"; "tjx with tokenizers", without tiktoken; "tokenizers", the fastest call of the
        library, with ids as lists; "tokenizers raw", the same without making lists.
    """

    def __init__(self, way: str) -> None:
        self._way = way

    def open(self, gpt2: str, documents: str, part: int, parts: int) -> Json:
        """Load the vocabulary and the documents of this process; encode them once."""
        texts: list[str] = json.loads(Path(documents).read_text())[part::parts]
        self._encode = self._encoder(Path(gpt2), texts)
        ids = [i for each in Tokenizer.load(gpt2).encode_batch(texts) for i in each]
        if self._way != "tokenizers raw":
            ids = [i for each in self._encode() for i in each]
        n_bytes = sum(len(text.encode("utf-8")) for text in texts)
        return {"n_tokens": len(ids), "n_bytes": n_bytes, "ids": ids_hash(ids)}

    def _encoder(self, gpt2: Path, texts: list[str]) -> Callable[[], Any]:
        if self._way.startswith("tjx"):
            ours = Tokenizer.load(gpt2)
            ours = ours.with_backend("tiktoken" if self._way == "tjx" else "tokenizers")
            return lambda: ours.encode_batch(texts)
        model = tokenizers.models.BPE.from_file(str(gpt2 / "encoder.json"), str(gpt2 / "vocab.bpe"))
        theirs = tokenizers.Tokenizer(model)
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        if self._way == "tokenizers raw":
            return lambda: theirs.encode_batch_fast(texts)
        return lambda: [encoding.ids for encoding in theirs.encode_batch_fast(texts)]

    def run(self) -> Json:
        """Encode all documents."""
        start = time.perf_counter()
        self._encode()
        return {"seconds": [time.perf_counter() - start]}


def ids_hash(ids: list[int]) -> str:
    """Return a hash of token ids."""
    return hashlib.sha256(array.array("I", ids).tobytes()).hexdigest()


def run_prepare(gpt2: str, corpus: list[str]) -> Json:
    """Prepare a set from files; return the time and the peak memory of each process."""
    tokenizer = Tokenizer.load(gpt2)
    with tempfile.TemporaryDirectory() as folder, _Memory() as memory:
        start = time.perf_counter()
        index = prepare(load_files(corpus), tokenizer, Path(folder) / "set")
        seconds = time.perf_counter() - start
    splits = index.splits.values()
    return {
        "seconds": [seconds],
        "n_tokens": sum(split.n_tokens for split in splits),
        "n_bytes": sum(split.n_text_bytes for split in splits),
        "processes": len(memory.mib),
        "peak_mib": round(sum(memory.mib.values())),
        "peak_mib_of_largest": round(max(memory.mib.values())),
    }


class _Memory:
    """Polls the peak resident memory of this process and its children."""

    def __init__(self) -> None:
        self.mib: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _poll(self) -> None:
        while True:
            children = [
                file.read_text().split() for file in Path("/proc/self/task").glob("*/children")
            ]
            for process in ["self", *(child for some in children for child in some)]:
                try:
                    status = Path(f"/proc/{process}/status").read_text()
                except OSError:  # the process has exited
                    continue
                if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                    self.mib[process] = int(found[1]) / 1024
            if self._ended.wait(POLL_SECONDS):
                return


if __name__ == "__main__":
    encoding = Encoding(sys.argv[1])
    serve({"open": encoding.open, "run": encoding.run, "prepare": run_prepare})
