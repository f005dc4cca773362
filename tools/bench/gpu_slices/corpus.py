"""Write a text whose characters are the tokens of a synthetic corpus with Zipf's distribution.

    python -m gpu_slices.corpus FILE --vocabulary 50000 --tokens 3000000

The GPU machine has no network, hence no GPT-2 tokenizer. With the character tokenizer each
character of this text is a token, so that embedding and head have the size of GPT-2's, and frequent
tokens collide in the gradient of the embedding as they do in English.
"""

import argparse
from pathlib import Path

import numpy as np
from gpu_slices.json_lines import begin, finish

FIRST = 0x4E00  # CJK ideographs and following blocks: printable characters
SURROGATES = range(0xD800, 0xE000)
OFFSET = 10.0  # of Zipf-Mandelbrot: the most frequent token is about 1 % of the text


def characters(count: int) -> np.ndarray:
    """Return `count` printable code points without white space, uint32 [count]."""
    found: list[int] = []
    point = FIRST
    while len(found) < count:
        if point not in SURROGATES and chr(point).isprintable():
            found.append(point)
        point += 1
    return np.array(found, np.uint32)


def write(file: Path, *, vocabulary: int, tokens: int) -> None:
    """Write the text.

    Parameters
    ----------
    file : Path
        Output file, UTF-8.
    vocabulary : int
        Number of distinct characters.
    tokens : int
        Number of characters of the text.
    """
    weights = 1 / (np.arange(vocabulary) + OFFSET)
    drawn = np.random.default_rng(0).choice(vocabulary, size=tokens, p=weights / weights.sum())
    text = characters(vocabulary)[drawn].astype("<u4").tobytes().decode("utf-32-le")
    file.write_text(text, encoding="utf-8")


def main() -> None:
    """Parse the command line and run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    given = parser.parse_args()
    begin("corpus")
    given.file.parent.mkdir(parents=True, exist_ok=True)
    write(given.file, vocabulary=given.vocabulary, tokens=given.tokens)
    finish("corpus", "ok", bytes=given.file.stat().st_size)


if __name__ == "__main__":
    main()
