"""Encode documents, and arrange them as token sequences to be scored.

The first token of a text is predicted from the end-of-text token, if the tokenizer has one, because
documents start this way in training. Otherwise the first token has no context and is not scored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import tee

import numpy as np
from numpy.typing import NDArray

import tjx_data
from tjx_eval.errors import EvalError
from tjx_eval.scoring.eval_data import Document

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # decoded from an incomplete UTF-8 sequence


@dataclass(frozen=True)
class EncodedDocument:
    """A document and its tokens.

    Attributes
    ----------
    document : Document
        The text, truncated if only a part is scored.
    tokens : int32 [tokens]
        Its tokens.
    """

    document: Document
    tokens: NDArray[np.int32]

    @property
    def n_words(self) -> int:
        """Number of whitespace-separated words."""
        return len(self.document.text.split())


@dataclass(frozen=True)
class ScoredSequences:
    """Token sequences to be scored, and the document of each scored token.

    Attributes
    ----------
    sequences : list of int32 [labels + 1]
        Every token but the first is scored.
    documents : list of int32 [labels]
        Document number of each scored token.
    """

    sequences: list[NDArray[np.int32]]
    documents: list[NDArray[np.int32]]

    @property
    def labels(self) -> NDArray[np.int32]:
        """All scored tokens, concatenated."""
        return np.concatenate([sequence[1:] for sequence in self.sequences])


def encode(
    documents: Iterator[Document], tokenizer: tjx_data.Tokenizer, max_tokens: int | None = None
) -> list[EncodedDocument]:
    """Encode documents up to `max_tokens` tokens in total, without splitting a character.

    Raises
    ------
    EvalError
        If there is no text, or the tokenizer cannot represent all of it: missing bytes would not be
        counted.
    """
    lengths = byte_lengths(tokenizer)
    for_tokens, for_names = tee(documents)
    encoded: list[EncodedDocument] = []
    left = max_tokens
    try:
        pairs = zip(
            for_names, tokenizer.encode_iterable(each.text for each in for_tokens), strict=True
        )
        for document, ids in pairs:
            tokens = np.asarray(ids, np.int32)
            _check_lossless(document, tokens, lengths)
            if left is not None and len(tokens) > left:
                tokens = tokens[:left]
                while tokenizer.decode(tokens).endswith(_REPLACEMENT):
                    tokens = tokens[:-1]
                document, left = Document(document.name, tokenizer.decode(tokens)), len(tokens)
            encoded.append(EncodedDocument(document, tokens))
            if left is not None and (left := left - len(tokens)) == 0:
                break
    except EvalError:
        raise
    except ValueError as error:
        raise EvalError(f"the text cannot be encoded: {error}") from error
    if not encoded:
        raise EvalError("got no text to score; give files that have some")
    return encoded


def make_sequences(
    encoded: list[EncodedDocument], eot: int | None, *, per_document: bool
) -> ScoredSequences:
    """Arrange documents as token sequences to be scored.

    Parameters
    ----------
    encoded : list of EncodedDocument
        The documents.
    eot : int or None
        End-of-text token, which precedes each document.
    per_document : bool
        Whether each document is a sequence of its own. Otherwise they are concatenated as in
        training; the end-of-text token between two is predicted too and has 0 bytes.

    Raises
    ------
    EvalError
        If there is nothing to predict.
    """
    prefix = np.array([] if eot is None else [eot], np.int32)
    sequences = [np.concatenate([prefix, each.tokens]) for each in encoded]
    owners = [np.full(len(s), number, np.int32) for number, s in enumerate(sequences)]
    if not per_document:
        if eot is not None:  # an end-of-text token belongs to the document that it ends
            for number in range(1, len(owners)):
                owners[number][0] = number - 1
        sequences, owners = [np.concatenate(sequences)], [np.concatenate(owners)]
    pairs = [(s, o[1:]) for s, o in zip(sequences, owners, strict=True) if len(s) > 1]
    if not pairs:
        raise EvalError("got a text of one token, which has no context; give a longer text")
    return ScoredSequences([s for s, _ in pairs], [o for _, o in pairs])


def byte_lengths(tokenizer: tjx_data.Tokenizer) -> NDArray[np.int32] | None:
    """Return the UTF-8 bytes of each token; None if they depend on neighboring tokens."""
    try:
        return tokenizer.token_byte_lengths
    except ValueError:
        return None


def _check_lossless(
    document: Document, tokens: NDArray[np.int32], lengths: NDArray[np.int32] | None
) -> None:
    if lengths is None:
        return
    encoded, given = int(lengths[tokens].sum()), len(document.text.encode())
    if encoded != given:
        raise EvalError(
            f"{document.name} ({document.preview!r}) has {given:,} bytes and the model's "
            f"tokenizer can encode {encoded:,} of them: give text in the characters that it has"
        )
