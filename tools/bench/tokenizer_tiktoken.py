"""Worker of the tokenizer benchmark for tiktoken; see tokenizer.py."""

import array
import hashlib
import json
import os
import time
from pathlib import Path

import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public as published  # pants: no-infer-dep
from turns import Json, serve


class Encoding:
    """Worker that encodes documents with the GPT-2 vocabulary, one thread per core.

    RAYON_NUM_THREADS sets the number of threads, as in the tokenizers library.
    """

    def open(self, gpt2: str, documents: str, part: int, parts: int) -> Json:
        """Load the vocabulary and the documents of this process; encode them once."""
        self._texts = json.loads(Path(documents).read_text())[part::parts]
        self._gpt2 = tiktoken.Encoding(
            "gpt2",
            pat_str=published.r50k_pat_str,
            mergeable_ranks=tiktoken.load.data_gym_to_mergeable_bpe_ranks(
                str(Path(gpt2) / "vocab.bpe"), str(Path(gpt2) / "encoder.json")
            ),
            special_tokens={published.ENDOFTEXT: 50256},
        )
        ids = array.array("I", [i for each in self._encode() for i in each])
        return {
            "n_tokens": len(ids),
            "n_bytes": sum(len(text.encode("utf-8")) for text in self._texts),
            "ids": hashlib.sha256(ids.tobytes()).hexdigest(),
            "version": tiktoken.__version__,
        }

    def _encode(self) -> list[list[int]]:
        n_threads = int(os.environ.get("RAYON_NUM_THREADS", os.cpu_count() or 1))
        ids: list[list[int]] = self._gpt2.encode_ordinary_batch(self._texts, num_threads=n_threads)
        return ids

    def run(self) -> Json:
        """Encode all documents."""
        start = time.perf_counter()
        self._encode()
        return {"seconds": [time.perf_counter() - start]}


if __name__ == "__main__":
    encoding = Encoding()
    serve({"open": encoding.open, "run": encoding.run})
