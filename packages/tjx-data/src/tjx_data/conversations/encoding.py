"""Encoding of conversations: tokens, and which of them the assistant generates."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tjx_data.conversations.config import Turns
from tjx_data.conversations.records import Conversation, Message
from tjx_data.conversations.template import ChatTemplate
from tjx_data.conversations.template_program import Span
from tjx_data.tokenization.tokenizer import Tokenizer


class EncodedConversation(NamedTuple):
    """Tokens of a conversation, and whether each is trained on.

    Attributes
    ----------
    tokens : int32 [T]
        Token ids.
    is_answer : bool [T]
        Whether the assistant generates the token.
    """

    tokens: npt.NDArray[np.int32]
    is_answer: npt.NDArray[np.bool_]


def encode_conversation(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    conversation: Conversation,
    *,
    turns: Turns = "all",
) -> EncodedConversation:
    """Render and encode a conversation, with a loss mask.

    Answers are encoded separately from the text around them, as in generation, where the prompt
    ends at the start of an answer. White space after the last special token of an answer (the
    newline of ChatML) is not part of it, since generation stops at that token.

    Parameters
    ----------
    template : ChatTemplate
        The template.
    tokenizer : Tokenizer
        The tokenizer. Special tokens of the template are encoded as such.
    conversation : Conversation
        The conversation.
    turns : {"all", "last"}
        Assistant messages in the mask.

    Returns
    -------
    EncodedConversation
        Token ids, and which of them the assistant generates.

    Raises
    ------
    ValueError
        If a message contains the name of a special token, the template rejects the conversation, or
        no token is by the assistant.

    Examples
    --------
    >>> from tjx_data import CHAT_TOKENS, byte_tokenizer, parse_conversation
    >>> conversation = parse_conversation({"prompt": "1 + 2 =", "completion": "3"})
    >>> tokens, is_answer = encode_conversation(
    ...     ChatTemplate.built_in("tjx"), byte_tokenizer(CHAT_TOKENS), conversation
    ... )
    >>> tokens[is_answer].tolist()
    [51, 260]
    """
    check_no_special_tokens(conversation.messages, tokenizer)
    text, spans = template.render_spans(
        conversation.messages, tools=conversation.tools, turns=turns
    )
    tokens: list[int] = []
    is_answer: list[bool] = []
    start = 0
    for begin, end in (_without_trailing_space(text, span, tokenizer) for span in spans):
        for piece, by_assistant in ((text[start:begin], False), (text[begin:end], True)):
            ids = encode_rendered(tokenizer, piece)
            tokens += ids
            is_answer += [by_assistant] * len(ids)
        start = end
    rest = encode_rendered(tokenizer, text[start:])
    tokens += rest
    is_answer += [False] * len(rest)
    if not any(is_answer):
        raise ValueError("has no token by the assistant")
    return EncodedConversation(np.array(tokens, np.int32), np.array(is_answer, np.bool_))


def encode_chat_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Encode messages and the start of the assistant's answer, the prompt of generation.

    Parameters
    ----------
    template, tokenizer
        As of `encode_conversation`.
    messages : sequence of dict
        The messages, the last one not by the assistant.
    tools : sequence of dict
        JSON schemas of the tools.

    Returns
    -------
    list of int
        Token ids, which end where the answer starts.

    Raises
    ------
    ValueError
        As `encode_conversation`.
    """
    check_no_special_tokens(messages, tokenizer)
    text = template.render(messages, tools=tools, add_generation_prompt=True)
    return encode_rendered(tokenizer, text)


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode rendered text: names of special tokens become their ids."""
    return tokenizer.encode(text, allowed_special=tokenizer.special_tokens)


def check_no_special_tokens(messages: Sequence[Message], tokenizer: Tokenizer) -> None:
    """Raise ValueError if a message contains the name of a special token.

    It would become a control token, with which a user could write as another role.
    """
    for number, message in enumerate(messages, start=1):
        for text in _strings(message):
            for name in tokenizer.special_tokens:
                if name in text:
                    raise ValueError(
                        f"message {number} contains {name}, a special token of the tokenizer"
                    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


def _without_trailing_space(text: str, span: Span, tokenizer: Tokenizer) -> Span:
    """Return a span without the white space that follows its last special token."""
    content = text[span.start : span.end]
    stripped = content.rstrip()
    ends_special = stripped.endswith(tuple(tokenizer.special_tokens))
    return Span(span.start, span.start + len(stripped)) if ends_special else span
