"""Encoding with tiktoken, for byte-level BPE vocabularies for which it gives equal ids.

tiktoken merges any two adjacent tokens whose concatenation is a token; `tokenizers` merges listed
pairs only. `merges_are_determined_by_tokens` has the condition under which both are the same.
"""

import importlib.metadata
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tokenizers

from tjx_data.tokenization.text_splitting import splits_before_space
from tjx_data.tokenization.vocabulary import BYTE_CHARACTERS, decode_byte_characters

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""tiktoken's pattern of r50k_base; splits every text as the ByteLevel pre-tokenizer does."""
SEGMENT_CHARACTERS = 1 << 15
"""Smallest segment of a long text: each core has several of a batch."""
_MIN_PARALLEL_CHARACTERS = 1 << 14  # starting threads takes as long as encoding a shorter text


class TiktokenEncoder:
    """Encode texts with tiktoken on all cores.

    Parameters
    ----------
    inner : tokenizers.Tokenizer
        A model that `find_obstacle` has accepted.
    description : Mapping
        Its JSON.
    """

    def __init__(self, inner: tokenizers.Tokenizer, description: Mapping[str, Any]):
        import tiktoken

        special = set(inner.get_added_tokens_decoder())
        ranks = {
            decode_byte_characters(token): i
            for token, i in description["model"]["vocab"].items()
            if i not in special
        }
        self._encoding = tiktoken.Encoding(
            "tjx", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, texts: Sequence[str], n_threads: int) -> list[list[int]]:
        """Encode texts; raise UnicodeEncodeError for a lone surrogate."""
        for text in texts:
            if not text.isascii():
                text.encode("utf-8")  # tiktoken replaces lone surrogates
        n_threads = min(n_threads, len(texts))
        if n_threads < 2 or sum(map(len, texts)) < _MIN_PARALLEL_CHARACTERS:
            return self._encode(texts)
        ids: list[list[int]] = [[]] * len(texts)
        with ThreadPoolExecutor(n_threads) as pool:
            groups = pool.map(self._encode, [texts[i::n_threads] for i in range(n_threads)])
            for i, group in enumerate(groups):
                ids[i::n_threads] = group
        return ids

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]


def tiktoken_version() -> str | None:
    """Return the version of tiktoken, or None if it is not installed."""
    try:
        return importlib.metadata.version("tiktoken")
    except importlib.metadata.PackageNotFoundError:
        return None


def find_obstacle(inner: tokenizers.Tokenizer, description: Mapping[str, Any]) -> str | None:
    """Return why tiktoken cannot encode as a tokenizer does, or None if its ids are equal.

    Parameters
    ----------
    inner : tokenizers.Tokenizer
        The model.
    description : Mapping
        Its JSON.
    """
    model = description["model"]
    if model["type"] != "BPE" or not model["merges"]:
        return "it has no BPE merges"
    pre_tokenizer = description["pre_tokenizer"]
    if (
        not splits_before_space(description)
        or pre_tokenizer is None
        or not pre_tokenizer["use_regex"]
    ):
        return "it does not split texts into words as GPT-2 does"
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    if any(model[name] for name in (*options, "byte_fallback", "ignore_merges")):
        return "its BPE model has options that tiktoken lacks"
    special = {token["id"] for token in description["added_tokens"]}
    tokens = {token: i for token, i in model["vocab"].items() if i not in special}
    if not set(BYTE_CHARACTERS) <= tokens.keys():
        return "its vocabulary lacks bytes"
    if not merges_are_determined_by_tokens(tokens, model["merges"], inner.model):
        return "its merges do not follow from its tokens"
    return None


def merges_are_determined_by_tokens(
    tokens: Mapping[str, int], merges: Sequence[Sequence[str]], model: Any
) -> bool:
    """Return whether merging in the order of token ids gives the ids of a merge list.

    This holds if each token of several bytes has exactly one merge, of tokens with smaller ids; ids
    are in the order of merges; and the merges turn the bytes of each token into that token. Were
    another pair of the same token ever adjacent in a text, it would be so in the bytes of the token
    alone as well, because merges inside a token are independent of the text around it.

    Parameters
    ----------
    tokens : Mapping
        Id of each token that is not special.
    merges : sequence of pairs
        The merge list.
    model : tokenizers.models.BPE
        The model of the tokens and merges.
    """
    merged = ["".join(pair) for pair in merges]
    n_bytes = sum(len(token) == 1 for token in tokens)
    if len(merged) != len(tokens) - n_bytes or any(token not in tokens for token in merged):
        return False
    ids = [tokens[token] for token in merged]
    if any(following <= i for i, following in itertools.pairwise(ids)):
        return False
    for pair, i in zip(merges, ids, strict=True):
        if any(len(token) > 1 and tokens.get(token, i) >= i for token in pair):
            return False
    encoded = tokenizers.Tokenizer(model).encode_batch_fast(merged)
    return all(encoding.ids == [i] for encoding, i in zip(encoded, ids, strict=True))
