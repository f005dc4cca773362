"""Response bodies of the OpenAI API: complete, or in streamed chunks."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from tjx_eval.serving.requests import CompletionRequest
from tjx_eval.serving.streaming import Chunk, TokenLogProbs

Json = dict[str, Any]


class ResponseFormat(Protocol):
    """Converts chunks of completions to response bodies."""

    def complete(self, chunks: Sequence[Chunk], usage: Json) -> Json:
        """Return the complete response, from one chunk per completion."""

    def chunk(self, chunk: Chunk) -> Json:
        """Return one streamed event."""

    def usage_chunk(self, usage: Json) -> Json:
        """Return the last streamed event, with the token counts."""


class CompletionFormat:
    """Response format of `/v1/completions`."""

    def __init__(self, model: str, request: CompletionRequest, prompts: Sequence[str]) -> None:
        self._head = _head("cmpl", "text_completion", model)
        self._request, self._prompts = request, prompts
        self._started: set[int] = set()

    def complete(self, chunks: Sequence[Chunk], usage: Json) -> Json:
        """Return the complete response, from one chunk per completion."""
        return {**self._head, "choices": list(map(self._choice, chunks)), "usage": usage}

    def chunk(self, chunk: Chunk) -> Json:
        """Return one streamed event."""
        return {**self._head, "choices": [self._choice(chunk)]}

    def usage_chunk(self, usage: Json) -> Json:
        """Return the last streamed event, with the token counts."""
        return {**self._head, "choices": [], "usage": usage}

    def _choice(self, chunk: Chunk) -> Json:
        prompt = ""
        if self._request.echo and chunk.index not in self._started:
            prompt = self._prompts[chunk.index // self._request.n]
        self._started.add(chunk.index)
        return {
            "index": chunk.index,
            "text": prompt + chunk.text,
            "logprobs": None if self._request.logprobs is None else _columns(chunk.tokens),
            "finish_reason": chunk.finish_reason,
        }


class ChatFormat:
    """Response format of `/v1/chat/completions`."""

    def __init__(self, model: str, request: CompletionRequest) -> None:
        self._request = request
        self._head = _head("chatcmpl", "chat.completion", model)
        self._chunk_head = {**self._head, "object": "chat.completion.chunk"}
        self._started: set[int] = set()

    def complete(self, chunks: Sequence[Chunk], usage: Json) -> Json:
        """Return the complete response, from one chunk per completion."""
        choices = [
            {
                "index": chunk.index,
                "message": {"role": "assistant", "content": chunk.text, "refusal": None},
                **self._common_fields(chunk),
            }
            for chunk in chunks
        ]
        return {**self._head, "choices": choices, "usage": usage}

    def chunk(self, chunk: Chunk) -> Json:
        """Return one streamed event."""
        role = {} if chunk.index in self._started else {"role": "assistant"}
        self._started.add(chunk.index)
        delta = {**role, "content": chunk.text}
        choice = {"index": chunk.index, "delta": delta, **self._common_fields(chunk)}
        return {**self._chunk_head, "choices": [choice]}

    def usage_chunk(self, usage: Json) -> Json:
        """Return the last streamed event, with the token counts."""
        return {**self._chunk_head, "choices": [], "usage": usage}

    def _common_fields(self, chunk: Chunk) -> Json:
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = {"content": list(map(_token_entry, chunk.tokens)), "refusal": None}
        return {"logprobs": logprobs, "finish_reason": chunk.finish_reason}


def _head(prefix: str, kind: str, model: str) -> Json:
    name = f"{prefix}-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def _columns(tokens: Sequence[TokenLogProbs]) -> Json:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.log_prob for token in tokens],
        "top_logprobs": [dict(token.top_log_probs) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _token_entry(token: TokenLogProbs) -> Json:
    def entry(text: str, log_prob: float) -> Json:
        return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}

    top = [entry(text, log_prob) for text, log_prob in token.top_log_probs]
    return {**entry(token.text, token.log_prob), "top_logprobs": top}
