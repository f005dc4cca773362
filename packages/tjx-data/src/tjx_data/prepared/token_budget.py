"""Limit of the training tokens of a prepared set."""

from collections.abc import Iterable, Sequence

import numpy as np

from tjx_data.corpora.documents import Holdout, SplitName
from tjx_data.prepared.tokenize_parts import Lengths, PartRecord, Tokens
from tjx_data.tokenization.tokenizer import Tokenizer


class TokenBudget:
    """Decide which parts of a corpus a limited set needs, independent of their order of arrival.

    With holdout "documents" the set consists of the parts up to the part that completes the
    training tokens. With "official" the validation parts are added to them. With "tail" all parts
    are needed, since the validation split is their end.

    Parameters
    ----------
    max_tokens : int or None
        Most training tokens; None for no limit.
    holdout : {"documents", "tail", "official"}
        How the validation split is made.
    """

    def __init__(self, max_tokens: int | None, holdout: Holdout) -> None:
        self._max_tokens = None if holdout == "tail" else max_tokens
        self._found: dict[int, tuple[SplitName, int]] = {}
        self._next = self._n_tokens = 0  # of the parts before `_next`, which are all known

    @property
    def reached(self) -> bool:
        """Whether the parts finished so far hold enough training tokens."""
        return self._max_tokens is not None and self._n_tokens >= self._max_tokens

    def add(self, number: int, split: SplitName, record: PartRecord) -> None:
        """Count a finished part, in any order."""
        self._found[number] = split, record.n_train_tokens
        while not self.reached and self._next in self._found:
            self._n_tokens += self._found.pop(self._next)[1]
            self._next += 1

    def needs(self, number: int, split: SplitName) -> bool:
        """Return whether a part belongs to the set; known once all submitted parts are added."""
        return not self.reached or split == "validation" or number < self._next


def cut_tokens(
    tokens: Tokens, lengths: Lengths, room: int, tokenizer: Tokenizer
) -> tuple[Tokens, Lengths, int]:
    """Return the first tokens of consecutive documents, the last of which may be cut.

    Parameters
    ----------
    tokens : uint16 or uint32 [sum of lengths]
        Documents, each followed by the end-of-text token, if the tokenizer has one.
    lengths : uint64 [documents]
        Tokens of each document.
    room : int
        Most tokens to return.
    tokenizer : Tokenizer
        The tokenizer that made the tokens.

    Returns
    -------
    tuple
        Tokens, lengths, and bytes of their text.
    """
    ends = np.minimum(np.cumsum(lengths, dtype=np.int64), room)
    kept = np.diff(ends, prepend=0)
    # A rest that is the end-of-text token alone would be an empty document.
    n_documents = int(np.count_nonzero(kept > (tokenizer.eot_id is not None)))
    kept = kept[:n_documents]
    tokens = tokens[: int(kept.sum())].copy()
    if tokenizer.eot_id is not None and n_documents:
        tokens[-1] = tokenizer.eot_id
    return tokens, kept.astype(np.uint64), _text_bytes(tokens, kept.tolist(), tokenizer)


def _text_bytes(tokens: Tokens, lengths: Sequence[int], tokenizer: Tokenizer) -> int:
    try:
        return int(tokenizer.token_byte_lengths[tokens].sum(dtype=np.int64))
    except ValueError:  # the text of a token depends on the tokens before it
        return sum(len(text.encode()) for text in _decoded(tokens, lengths, tokenizer))


def _decoded(tokens: Tokens, lengths: Sequence[int], tokenizer: Tokenizer) -> Iterable[str]:
    start = 0
    for length in lengths:
        ids = tokens[start : start + length].tolist()
        yield tokenizer.decode([token for token in ids if token != tokenizer.eot_id])
        start += length
