"""Words of a text, and hashes of its word n-grams."""

import re
import zlib

import numpy as np
import numpy.typing as npt

# Scripts without spaces: each character counts as a word.
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))

Hashes = npt.NDArray[np.uint64]


def normalized_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation.

    Examples
    --------
    >>> normalized_words("Don't stop: 12.")
    ['don', 't', 'stop', '12']
    """
    return _WORD.findall(text.lower())


def word_hashes(words: list[str]) -> Hashes:
    """Return a hash of each word, uint64 [words]."""
    hashes = (zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words)
    return np.fromiter(hashes, np.uint64, len(words))


def ngram_hashes(hashes: Hashes, n: int) -> Hashes:
    """Hash every `n` consecutive words.

    Parameters
    ----------
    hashes : array
        Hashes of words, uint64 [words].
    n : int
        Words of an n-gram.

    Returns
    -------
    array
        uint64 [max(words - n + 1, 0)]. Equal n-grams have equal hashes; others collide with a
        probability of about 2**-32 per word in which they differ.
    """
    count = max(len(hashes) - n + 1, 0)
    combined = np.zeros(count, np.uint64)
    for i in range(n):  # wraps modulo 2**64
        combined = combined * _FACTOR + hashes[i : i + count]
    combined = (combined ^ (combined >> np.uint64(30))) * _MIX[0]
    combined = (combined ^ (combined >> np.uint64(27))) * _MIX[1]
    return combined ^ (combined >> np.uint64(31))
