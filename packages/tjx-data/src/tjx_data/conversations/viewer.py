"""Viewer of conversations: tokens on the terminal, coloured by the loss mask."""

from collections.abc import Iterator

from tjx_core import printable
from tjx_data.conversations.encoding import EncodedConversation
from tjx_data.tokenization.tokenizer import Tokenizer

_GREEN, _GREY, _OFF = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def format_conversation(
    encoded: EncodedConversation, tokenizer: Tokenizer, *, color: bool = True
) -> str:
    """Format tokens, separated by "|": tokens that are trained on in green, or in brackets.

    Parameters
    ----------
    encoded : EncodedConversation
        The conversation.
    tokenizer : Tokenizer
        The tokenizer of its tokens.
    color : bool
        Whether to use terminal colors; otherwise spans that are trained on are in ⟦ and ⟧.

    Examples
    --------
    >>> import numpy as np
    >>> from tjx_data import byte_tokenizer
    >>> encoded = EncodedConversation(np.array([104, 105, 33]), np.array([False, True, True]))
    >>> format_conversation(encoded, byte_tokenizer(), color=False)
    'h⟦i|!⟧'
    """
    parts = []
    for is_answer, ids in _spans(encoded):
        text = "|".join(_printed(tokenizer, i) for i in ids)
        if color:
            parts.append(f"{_GREEN if is_answer else _GREY}{text}{_OFF}")
        else:
            parts.append(f"⟦{text}⟧" if is_answer else text)
    return "".join(parts)


def _spans(encoded: EncodedConversation) -> Iterator[tuple[bool, list[int]]]:
    """Yield consecutive tokens with the same mask."""
    start = 0
    mask, tokens = encoded.is_answer.tolist(), encoded.tokens.tolist()
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or mask[end] != mask[start]:
            yield mask[start], tokens[start:end]
            start = end


def _printed(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token, safe to print; a mark precedes a newline."""
    return printable(tokenizer.decode([token])).replace("\n", "↵\n")
