"""Near-duplicates by MinHash and locality-sensitive hashing (Broder 1997; Lee et al. 2022).

The signature of a document estimates the Jaccard similarity of its word pairs to those of others.
Documents that agree in all values of a band of the signature are candidates. Candidates are
compared by whole signatures, and connected ones form a cluster, of which the first is kept.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tjx_data.cleaning.words import Hashes, ngram_hashes

SHINGLE_WORDS = 2
"""Words of a shingle. Of documents of which 20 % of the words differ, about half of the pairs of
words are the same, but a fifth of the sequences of 5 only."""
BAND_ROWS = 3
"""Values of a band: fewer find more candidates, more need fewer comparisons."""
N_BANDS = 64
N_VALUES = BAND_ROWS * N_BANDS
"""Values of a signature. Pairs with a similarity of 0.4 become candidates with a probability of
1 - (1 - 0.4**3)**64 = 0.99, those with 0.1 with 0.06."""
_PAIRS_AT_ONCE = 1 << 15

Signatures = npt.NDArray[np.uint32]


@cache
def _empty_sketch() -> Any:
    try:
        from datasketch import MinHash
    except ImportError as error:
        raise ValueError(
            "near_duplicates: got a threshold; expected None without the library datasketch; "
            "pip install 'tjx-data[near-duplicates]'"
        ) from error
    return MinHash(num_perm=N_VALUES, seed=1, hashfunc=int, scheme="affine32")


def check_installed() -> None:
    """Raise ValueError if the extra ``near-duplicates`` is not installed."""
    _empty_sketch()


def signature(words: Hashes) -> Signatures:
    """Return the MinHash signature of a document, uint32 [N_VALUES].

    Parameters
    ----------
    words : array
        Hashes of its words, uint64 [words].
    """
    shingles = ngram_hashes(words, min(SHINGLE_WORDS, max(len(words), 1)))
    sketch = _empty_sketch().copy()
    sketch.update_batch(np.unique(shingles >> np.uint64(32)).tolist())
    values: Signatures = np.asarray(sketch.hashvalues, np.uint32)
    return values


def first_of_cluster(signatures: Signatures, threshold: float) -> npt.NDArray[np.int64]:
    """Return the first document of each document's cluster of near-duplicates.

    Parameters
    ----------
    signatures : array
        uint32 [documents, N_VALUES]; may be a memmap, of which a band is read at a time.
    threshold : float
        Smallest estimated Jaccard similarity of near-duplicates.

    Returns
    -------
    array
        int64 [documents]: the index of the document itself where it is the first.
    """
    first = np.arange(len(signatures), dtype=np.int64)
    for start in range(0, N_VALUES, BAND_ROWS):
        band = np.ascontiguousarray(signatures[:, start : start + BAND_ROWS])
        keys = band.view(f"V{band.dtype.itemsize * BAND_ROWS}")[:, 0]
        _, representative, inverse = np.unique(keys, return_index=True, return_inverse=True)
        pairs = _candidates(representative[inverse], inverse)
        for chunk in range(0, len(pairs), _PAIRS_AT_ONCE):
            left, right = pairs[chunk : chunk + _PAIRS_AT_ONCE].T
            equal = (signatures[left] == signatures[right]).mean(axis=1) >= threshold
            for a, b in zip(left[equal].tolist(), right[equal].tolist(), strict=True):
                _join(first, a, b)
    for i in range(len(first)):  # a parent comes before its children
        first[i] = first[first[i]]
    return first


def _candidates(
    representative: npt.NDArray[np.int64], group: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Pair each document of a group with its first, and with the one before it; [pairs, 2]."""
    order = np.argsort(group, kind="stable")
    same = group[order[1:]] == group[order[:-1]]
    neighbors = np.stack([order[:-1][same], order[1:][same]], axis=1)
    later = order[1:][same]
    with_first = np.stack([representative[later], later], axis=1)
    return np.unique(np.concatenate([neighbors, with_first]), axis=0)


def _join(first: npt.NDArray[np.int64], a: int, b: int) -> None:
    while first[a] != a:
        first[a] = first[first[a]]
        a = int(first[a])
    while first[b] != b:
        first[b] = first[first[b]]
        b = int(first[b])
    first[max(a, b)] = min(a, b)
