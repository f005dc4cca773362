"""Decontamination: overlap of documents with evaluation texts in n-grams of words.

As for GPT-3 (Brown et al. 2020, appendix C), texts are compared in lower case without punctuation,
by 13-grams. Shorter evaluation texts are compared as a whole. A punctuation mark within a word
separates it in one comparison and is left out in another, so that a copy without punctuation
("U.S." as "US") is found too.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from tjx_data.cleaning.words import Hashes, ngram_hashes, normalized_words, word_hashes

NGRAM_WORDS = 13
MIN_WORDS = 5
"""Shorter evaluation texts, such as "Yes.", are not searched: they occur by chance."""

_PUNCTUATION = re.compile(r"[^\w\s]+")


def index_evaluation_texts(texts: Iterable[str]) -> tuple[dict[int, Hashes], int]:
    """Return the sorted n-gram hashes of evaluation texts by n, and the number of short texts.

    Parameters
    ----------
    texts : Iterable[str]
        Evaluation texts.
    """
    found: dict[int, list[Hashes]] = {}
    n_short = 0
    for text in texts:
        forms = [hashes for hashes in _forms(text) if len(hashes) >= MIN_WORDS]
        n_short += not forms
        for hashes in forms:
            n = min(len(hashes), NGRAM_WORDS)
            found.setdefault(n, []).append(np.unique(ngram_hashes(hashes, n)))
    return {n: np.unique(np.concatenate(some)) for n, some in sorted(found.items())}, n_short


def is_contaminated(text: str, index: Mapping[int, Hashes]) -> bool:
    """Return whether a document has an n-gram of an evaluation text.

    Parameters
    ----------
    text : str
        The document.
    index : Mapping
        From `index_evaluation_texts`.
    """
    return bool(index) and any(_overlaps(words, index) for words in _forms(text))


def _forms(text: str) -> Iterator[Hashes]:
    """Yield the hashes of the words, uint64 [words], and of those without inner punctuation."""
    yield word_hashes(normalized_words(text))
    yield word_hashes(normalized_words(_PUNCTUATION.sub("", text)))


def _overlaps(words: Hashes, index: Mapping[int, Hashes]) -> bool:
    for n, known in index.items():
        hashes = ngram_hashes(words, n)
        places = np.searchsorted(known, hashes)
        places[places == len(known)] = 0
        if (known[places] == hashes).any():
            return True
    return False
