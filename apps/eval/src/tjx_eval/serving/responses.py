"""Response bodies of the OpenAI API: complete, or in streamed chunks."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from tjx_eval.serving.requests import CompletionRequest
from tjx_eval.serving.streaming import Chunk, TokenLogProbs, merged
from tjx_eval.serving.tool_calls import split_tool_calls

Json = dict[str, Any]


class ResponseFormat(Protocol):
    """Converts chunks of completions to response bodies."""

    def complete(self, chunks: Sequence[Chunk], usage: Json) -> Json:
        """Return the complete response, from one chunk per completion."""

    def chunk(self, chunk: Chunk) -> Json | None:
        """Return one streamed event; None if the chunk is held back."""

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
        self._held: dict[int, Chunk] = {}

    def complete(self, chunks: Sequence[Chunk], usage: Json) -> Json:
        """Return the complete response, from one chunk per completion."""
        choices = [
            {
                "index": chunk.index,
                "message": {"role": "assistant", "refusal": None, **message},
                **self._common_fields(chunk, message),
            }
            for chunk in chunks
            for message in [self._message(chunk)]
        ]
        return {**self._head, "choices": choices, "usage": usage}

    def chunk(self, chunk: Chunk) -> Json | None:
        """Return one streamed event; None if the chunk is held back.

        An answer that may contain calls of tools is held back until it has ended.
        """
        if self._request.tool_notation is not None:
            chunk = self._held[chunk.index] = merged(self._held.get(chunk.index), chunk)
            if chunk.finish_reason is None:
                return None
        role = {} if chunk.index in self._started else {"role": "assistant"}
        self._started.add(chunk.index)
        message = self._message(chunk)
        for number, call in enumerate(message.get("tool_calls", [])):
            call["index"] = number
        choice = {
            "index": chunk.index, "delta": {**role, **message},
            **self._common_fields(chunk, message),
        }  # fmt: skip
        return {**self._chunk_head, "choices": [choice]}

    def usage_chunk(self, usage: Json) -> Json:
        """Return the last streamed event, with the token counts."""
        return {**self._chunk_head, "choices": [], "usage": usage}

    def _message(self, chunk: Chunk) -> Json:
        """Return the content of an answer, and its calls of tools if there are any."""
        if self._request.tool_notation is None:
            return {"content": chunk.text}
        content, calls = split_tool_calls(chunk.text, self._request.tool_notation)
        if not calls:
            return {"content": content}
        return {"content": content or None, "tool_calls": [call.to_json() for call in calls]}

    def _common_fields(self, chunk: Chunk, message: Json) -> Json:
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = {"content": list(map(_token_entry, chunk.tokens)), "refusal": None}
        reason = "tool_calls" if "tool_calls" in message else chunk.finish_reason
        return {"logprobs": logprobs, "finish_reason": reason}


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
