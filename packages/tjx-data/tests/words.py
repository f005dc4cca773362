"""Program that prepares two megabytes of deterministic documents."""

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tjx_data.corpora import documents
from tjx_data.corpora.documents import Documents
from tjx_data.prepared.prepare import prepare
from tjx_data.tokenization.builders import char_tokenizer

TOKENIZER = char_tokenizer(["abcdefghijklmnopqrstuvwxyz \n."], special_tokens=("<|endoftext|>",))
SHARD_TOKENS = 300_000


def corpus() -> Documents:
    """Return the documents."""
    draws = random.Random(0)  # noqa: S311  words, not secrets
    words = ["".join(draws.choices("abcdefghij", k=draws.randint(1, 9))) for _ in range(500)]
    texts = [" ".join(draws.choices(words, k=draws.randint(1, 600))) for _ in range(1200)]
    return Documents.of(lambda: texts, {"corpus": "words"}, sum(map(len, texts)))


def prepare_words(directory: Path) -> None:
    """Prepare the documents in this process."""
    with ThreadPoolExecutor(1) as one:
        prepare(corpus(), TOKENIZER, directory, shard_tokens=SHARD_TOKENS, executor=one)


if __name__ == "__main__":  # words.py FOLDER processes|here
    documents.PART_CHARACTERS = 30_000  # some 60 parts
    if sys.argv[2] == "processes":
        prepare(corpus(), TOKENIZER, sys.argv[1], shard_tokens=SHARD_TOKENS)
    else:
        prepare_words(Path(sys.argv[1]))
