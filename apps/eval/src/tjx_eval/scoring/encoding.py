"""Texts as tokens to be scored: what each document's first token is predicted from, and its size.

The first token of a text is predicted from the end-of-text token, where the tokenizer has one: so
documents begin in training. Without one, a text's first token is predicted from nothing, and is not
scored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import tee

import numpy as np
from numpy.typing import NDArray

import tjx_data
from tjx_eval.errors import EvalError
from tjx_eval.scoring.eval_data import Document

_HALF = "\N{REPLACEMENT CHARACTER}"  # what a character becomes that was cut in two


@dataclass(frozen=True)
class Encoded:
    """A document's tokens.

    Attributes
    ----------
    document : Document
        Its text, as far as it was taken.
    tokens : int32 [tokens]
        All of them.
    """

    document: Document
    tokens: NDArray[np.int32]

    @property
    def name(self) -> str:
        """The document's name."""
        return self.document.name

    @property
    def beginning(self) -> str:
        """The document's first words."""
        return self.document.beginning

    @property
    def words(self) -> int:
        """Stretches of its text between white space."""
        return len(self.document.text.split())


@dataclass(frozen=True)
class Labelled:
    """Tokens to be scored, and the document of each.

    Attributes
    ----------
    stretches : list of int32 [labels + 1]
        Each is scored by itself: every token but its first.
    documents : list of int32 [labels]
        The number of the document that each scored token belongs to.
    """

    stretches: list[NDArray[np.int32]]
    documents: list[NDArray[np.int32]]

    @property
    def labels(self) -> NDArray[np.int32]:
        """All that is scored, one stretch after the other."""
        return np.concatenate([stretch[1:] for stretch in self.stretches])


def encode(
    documents: Iterator[Document], tokenizer: tjx_data.Tokenizer, max_tokens: int | None = None
) -> list[Encoded]:
    """Encode documents, until there are `max_tokens`; no character is cut in two.

    Raises
    ------
    RunError
        If there is no text, or the tokenizer cannot write it: what is lost would count nowhere.
    """
    lengths = byte_lengths(tokenizer)
    for_tokens, for_names = tee(documents)
    found: list[Encoded] = []
    left = max_tokens
    try:
        pairs = zip(
            for_names, tokenizer.encode_iterable(each.text for each in for_tokens), strict=True
        )
        for document, ids in pairs:
            tokens = np.asarray(ids, np.int32)
            _refuse_loss(document, tokens, lengths)
            if left is not None and len(tokens) > left:
                tokens = tokens[:left]
                while tokenizer.decode(tokens).endswith(_HALF):
                    tokens = tokens[:-1]
                document, left = Document(document.name, tokenizer.decode(tokens)), len(tokens)
            found.append(Encoded(document, tokens))
            if left is not None and (left := left - len(tokens)) == 0:
                break
    except EvalError:
        raise
    except ValueError as error:
        raise EvalError(f"the text cannot be encoded: {error}") from error
    if not found:
        raise EvalError("there is no text to score: give files that hold some")
    return found


def label(encoded: list[Encoded], eot: int | None, *, per_document: bool) -> Labelled:
    """Lay out documents to be scored.

    Parameters
    ----------
    encoded : list of Encoded
        The documents.
    eot : int or None
        What stands before a document.
    per_document : bool
        Whether each stands for itself. Otherwise they follow each other as in training, with the
        end-of-text token between two; it is predicted too, and stands for no bytes.

    Raises
    ------
    RunError
        If nothing is left to be predicted.
    """
    begin = np.array([] if eot is None else [eot], np.int32)
    stretches = [np.concatenate([begin, each.tokens]) for each in encoded]
    owners = [np.full(len(s), number, np.int32) for number, s in enumerate(stretches)]
    if not per_document:
        if eot is not None:  # an end belongs to the document that it ends
            for number in range(1, len(owners)):
                owners[number][0] = number - 1
        stretches, owners = [np.concatenate(stretches)], [np.concatenate(owners)]
    pairs = [(s, o[1:]) for s, o in zip(stretches, owners, strict=True) if len(s) > 1]
    if not pairs:
        raise EvalError("the text has a single token, which is predicted from nothing: give more")
    return Labelled([s for s, _ in pairs], [o for _, o in pairs])


def byte_lengths(tokenizer: tjx_data.Tokenizer) -> NDArray[np.int32] | None:
    """Return the bytes that each token stands for; None where they depend on its neighbours."""
    try:
        return tokenizer.token_byte_lengths
    except ValueError:
        return None


def _refuse_loss(
    document: Document, tokens: NDArray[np.int32], lengths: NDArray[np.int32] | None
) -> None:
    if lengths is None:
        return
    written, given = int(lengths[tokens].sum()), len(document.text.encode())
    if written != given:
        raise EvalError(
            f"{document.name} ({document.beginning!r}) has {given:,} bytes and the model's "
            f"tokenizer can write {written:,} of them: give text in the characters that it knows"
        )
