"""Encoding of texts in parallel: segments, special tokens and the library that encodes."""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain
from typing import Any

import tokenizers

from tjx_data.tokenization.file_formats import MAX_QUOTED_CHARACTERS, is_tokenizers_error
from tjx_data.tokenization.text_splitting import (
    LONE_SURROGATE,
    SEGMENT_CHARACTERS,
    TextSegment,
    encode_batches,
    segment_batches,
    splits_before_space,
)
from tjx_data.tokenization.tiktoken_backend import (
    SEGMENT_CHARACTERS as TIKTOKEN_SEGMENT_CHARACTERS,
)
from tjx_data.tokenization.tiktoken_backend import TiktokenEncoder
from tjx_data.tokenization.vocabulary import unknown_characters_error

_NONCHARACTER = "\U0010ffff"


class TextEncoder:
    """Encode streams of texts in parallel and in bounded memory.

    Parameters
    ----------
    inner : tokenizers.Tokenizer
        The model.
    description : dict
        Its JSON.
    special_tokens : Mapping[str, int]
        Id of each special token.
    tiktoken : TiktokenEncoder or None
        Encoder with equal ids to use instead.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        description: Any,
        special_tokens: Mapping[str, int],
        tiktoken: TiktokenEncoder | None,
    ) -> None:
        self._inner, self._description = inner, description
        self._special_tokens, self._tiktoken = special_tokens, tiktoken

    def encode(self, texts: Iterable[str], special: Mapping[str, int]) -> Iterator[list[int]]:
        """Yield the ids of each text, where `special` names are encoded to their ids.

        Raises
        ------
        ValueError
            If a text has no UTF-8, or a character tokenizer lacks characters of it.
        """
        if not special:
            yield from self._encode_ordinary(texts)
            return
        longest_first = sorted(special, key=len, reverse=True)
        pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        names: deque[list[str]] = deque()  # special tokens of each text that is read

        def sections() -> Iterator[str]:
            for text in texts:
                # re.split with a group alternates: text, special, text, special, ..., text.
                parts = pattern.split(text)
                names.append(parts[1::2])
                yield from parts[::2]

        encoded = self._encode_ordinary(sections())
        for ids in encoded:
            for name in names.popleft():
                ids += [special[name], *next(encoded)]
            yield ids

    def _encode_ordinary(self, texts: Iterable[str]) -> Iterator[list[int]]:
        pending: list[list[int]] = []  # ids of the segments of an unfinished text
        batches = segment_batches(texts, self._segment_size)
        for batch, encoded in encode_batches(self._encode_segments, batches):
            for segment, ids in zip(batch, encoded, strict=True):
                if self._unknown_id is not None and self._unknown_id in ids:
                    known = (
                        self._inner.get_vocab(with_added_tokens=True).keys()
                        - self._special_tokens.keys()
                    )
                    raise unknown_characters_error(segment.text, known)
                pending.append(ids)
                if segment.is_last:
                    yield pending[0] if len(pending) == 1 else list(chain.from_iterable(pending))
                    pending = []
        assert not pending

    def _encode_segments(self, segments: list[TextSegment], n_threads: int) -> list[list[int]]:
        texts = [segment.text for segment in segments]
        try:
            if self._tiktoken is not None:
                return self._tiktoken.encode(texts, n_threads)
            # The fast form omits the character offsets (up to 10x).
            encoded = self._ordinary.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encoded]
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(LONE_SURROGATE) from error
        except BaseException as error:
            raise wrap_error("encode a text", error) from error

    @cached_property
    def _ordinary(self) -> tokenizers.Tokenizer:
        """The model for ordinary text, in which a Unigram model does not find special tokens."""
        if self._description["model"]["type"] != "Unigram" or not self._special_tokens:
            return self._inner
        description = json.loads(self._inner.to_str())
        for entry in description["model"]["vocab"]:
            if entry[0] in self._special_tokens:
                entry[0] = _NONCHARACTER + entry[0]
        added = description["added_tokens"]
        description["added_tokens"] = [one for one in added if not one["special"]]
        return tokenizers.Tokenizer.from_str(json.dumps(description))

    @cached_property
    def _segment_size(self) -> int | None:
        """Characters of a segment; None if splitting a text could change its ids."""
        if not splits_before_space(self._description):
            return None
        return SEGMENT_CHARACTERS if self._tiktoken is None else TIKTOKEN_SEGMENT_CHARACTERS

    @cached_property
    def _unknown_id(self) -> int | None:
        """The id of unknown characters for a character tokenizer, else None."""
        model = self._description["model"]
        if model["type"] != "BPE" or model["merges"] or model["unk_token"] is None:
            return None
        return self._inner.token_to_id(model["unk_token"])


def wrap_error(operation: str, error: BaseException) -> BaseException:
    """Return a ValueError for an error of the `tokenizers` library, any other error unchanged."""
    if not is_tokenizers_error(error):
        return error
    return ValueError(f"this tokenizer cannot {operation}: {str(error)[:MAX_QUOTED_CHARACTERS]}")
