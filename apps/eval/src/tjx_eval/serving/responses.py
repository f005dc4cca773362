"""Answers as OpenAI's clients read them: whole, or in chunks."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from tjx_eval.serving.requests import CompletionRequest
from tjx_eval.serving.streaming import Piece, TokenLogProbs

Json = dict[str, Any]


@runtime_checkable
class Form(Protocol):
    """How an answer is written down."""

    def whole(self, pieces: Sequence[Piece], usage: Json) -> Json:
        """Return the answer, of one piece for each continuation."""

    def chunk(self, piece: Piece) -> Json:
        """Return a part of the answer."""

    def usage_chunk(self, usage: Json) -> Json:
        """Return the last part, with the number of tokens."""


class CompletionForm:
    """Of `/v1/completions`."""

    def __init__(self, model: str, asked: CompletionRequest, prompts: Sequence[str]) -> None:
        self._head = _head("cmpl", "text_completion", model)
        self._asked, self._prompts = asked, prompts
        self._begun: set[int] = set()

    def whole(self, pieces: Sequence[Piece], usage: Json) -> Json:
        """Return the answer, of one piece for each continuation."""
        return {**self._head, "choices": list(map(self._choice, pieces)), "usage": usage}

    def chunk(self, piece: Piece) -> Json:
        """Return a part of the answer."""
        return {**self._head, "choices": [self._choice(piece)]}

    def usage_chunk(self, usage: Json) -> Json:
        """Return the last part, with the number of tokens."""
        return {**self._head, "choices": [], "usage": usage}

    def _choice(self, piece: Piece) -> Json:
        before = ""
        if self._asked.echo and piece.index not in self._begun:
            before = self._prompts[piece.index // self._asked.n]
        self._begun.add(piece.index)
        return {
            "index": piece.index,
            "text": before + piece.text,
            "logprobs": None if self._asked.logprobs is None else _columns(piece.tokens),
            "finish_reason": piece.finish_reason,
        }


class ChatForm:
    """Of `/v1/chat/completions`."""

    def __init__(self, model: str, asked: CompletionRequest) -> None:
        self._asked = asked
        self._head = _head("chatcmpl", "chat.completion", model)
        self._chunk_head = {**self._head, "object": "chat.completion.chunk"}
        self._begun: set[int] = set()

    def whole(self, pieces: Sequence[Piece], usage: Json) -> Json:
        """Return the answer, of one piece for each continuation."""
        choices = [
            {
                "index": piece.index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                **self._rest(piece),
            }
            for piece in pieces
        ]
        return {**self._head, "choices": choices, "usage": usage}

    def chunk(self, piece: Piece) -> Json:
        """Return a part of the answer."""
        role = {} if piece.index in self._begun else {"role": "assistant"}
        self._begun.add(piece.index)
        delta = {**role, "content": piece.text}
        choice = {"index": piece.index, "delta": delta, **self._rest(piece)}
        return {**self._chunk_head, "choices": [choice]}

    def usage_chunk(self, usage: Json) -> Json:
        """Return the last part, with the number of tokens."""
        return {**self._chunk_head, "choices": [], "usage": usage}

    def _rest(self, piece: Piece) -> Json:
        asked = self._asked.logprobs is not None
        told = {"content": list(map(_told, piece.tokens)), "refusal": None} if asked else None
        return {"logprobs": told, "finish_reason": piece.finish_reason}


def _head(prefix: str, kind: str, model: str) -> Json:
    name = f"{prefix}-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def _columns(tokens: Sequence[TokenLogProbs]) -> Json:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.log_prob for token in tokens],
        "top_logprobs": [dict(token.top_tokens) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _told(token: TokenLogProbs) -> Json:
    def one(text: str, log_prob: float) -> Json:
        return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}

    top_tokens = [one(text, log_prob) for text, log_prob in token.top_tokens]
    return {**one(token.text, token.log_prob), "top_logprobs": top_tokens}
