"""Stream text from the engine's thread to the event loop of an HTTP request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import tjx_data
from tjx_eval.serving.engine import (
    Engine,
    EngineStoppedError,
    GenerationRequest,
    QueueFullError,
    Token,
)
from tjx_eval.serving.errors import APIError
from tjx_eval.serving.requests import CompletionRequest, Prompt
from tjx_trainer.run_reader import TextStream, decode_text


class TokenLogProbs(NamedTuple):
    """Log-probabilities of one token; `offset` is its position in the text, in characters."""

    text: str
    log_prob: float
    top_log_probs: list[tuple[str, float]]
    offset: int


@dataclass
class Chunk:
    """New text of one completion.

    Attributes
    ----------
    index : int
        Index of the completion.
    text : str
        Text after the previous chunks.
    tokens : list of TokenLogProbs
        Its tokens, if log-probabilities were requested.
    finish_reason : str or None
        "stop" or "length" in the last chunk.
    error : str or None
        Why the completion is incomplete.
    """

    index: int
    text: str = ""
    tokens: list[TokenLogProbs] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


def merged(before: Chunk | None, chunk: Chunk) -> Chunk:
    """Return one chunk for the text of several."""
    if before is None:
        return chunk
    return replace(chunk, text=before.text + chunk.text, tokens=[*before.tokens, *chunk.tokens])


class CompletionStreams:
    """All completions of one HTTP request; iterate asynchronously over their chunks.

    Parameters
    ----------
    engine : Engine
        Generates the tokens.
    tokenizer : tjx_data.Tokenizer
        The model's tokenizer.
    request : CompletionRequest
        The request.
    strip : bool
        Whether to remove leading whitespace of each completion.

    Attributes
    ----------
    prompt_tokens, completion_tokens : int
        Token counts so far, over all completions.

    Raises
    ------
    APIError
        If the request does not fit the model.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: tjx_data.Tokenizer,
        request: CompletionRequest,
        *,
        strip: bool = False,
    ) -> None:
        self._engine, self._request = engine, request
        # Check before encoding, which would take long for thousands of prompts.
        if (count := len(request.prompts) * request.n) > engine.max_waiting:
            raise APIError(
                400,
                f"got {count} completions at once; expected at most {engine.max_waiting}",
                param="n",
            )
        prompts = [_encode(tokenizer, prompt) for prompt in request.prompts]
        self.prompt_tokens = sum(map(len, prompts))
        self.completion_tokens = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._chunks: asyncio.Queue[Chunk] = asyncio.Queue()
        self._requests = [
            self._generation_request(tokenizer, i * request.n + j, prompt, request.seed + j, strip)
            for i, prompt in enumerate(prompts)
            for j in range(request.n)
        ]

    def submit(self) -> None:
        """Queue the completions; call it in the event loop that reads the chunks.

        Raises
        ------
        APIError
            If the request does not fit the model, or the queue is full.
        """
        self._loop = asyncio.get_running_loop()
        try:
            self._engine.submit(self._requests)
        except ValueError as error:
            raise APIError(400, "; ".join(str(error).splitlines())) from error
        except QueueFullError as error:
            raise APIError(429, str(error), code="too_many_requests") from error
        except EngineStoppedError as error:
            raise APIError(503, str(error)) from error

    def cancel(self) -> None:
        """End all unfinished completions."""
        self._engine.cancel(self._requests)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Yield chunks until every completion has ended."""
        running = len(self._requests)
        while running:
            chunk = await self._chunks.get()
            running -= chunk.finish_reason is not None or chunk.error is not None
            yield chunk

    def publish(self, chunk: Chunk, tokens: int) -> None:
        """Pass a chunk to the event loop, from any thread."""
        assert self._loop is not None

        def put() -> None:
            self.completion_tokens += tokens
            self._chunks.put_nowait(chunk)

        with suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(put)

    def _generation_request(
        self, tokenizer: tjx_data.Tokenizer, index: int, prompt: list[int], seed: int, strip: bool
    ) -> GenerationRequest:
        request, decoder = self._request, self._engine.decoder
        room = decoder.max_len - len(prompt)
        new = room if request.max_tokens is None else request.max_tokens
        if new > room or room < 1:
            raise APIError(
                400,
                f"this model's context is {decoder.max_len} tokens; the prompt has {len(prompt)} "
                f"and {max(new, 1)} new ones are requested: give a shorter prompt or fewer tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        writer = _ChunkWriter(self, tokenizer, index, request, strip)
        options = request.options.copy()
        options["seed"] = seed % 2**32
        if options.get("top_k") is not None:
            options["top_k"] = min(options["top_k"] or 1, decoder.config.vocab_size)
        return GenerationRequest(prompt, new, options, writer.on_token, writer.on_end)


class _ChunkWriter:
    """Converts the tokens of one completion to chunks, in the engine's thread."""

    def __init__(
        self,
        streams: CompletionStreams,
        tokenizer: tjx_data.Tokenizer,
        index: int,
        request: CompletionRequest,
        strip: bool,
    ) -> None:
        self._streams, self._tokenizer, self._index = streams, tokenizer, index
        self._text = TextStream(tokenizer, request.stops, ends_with_document=True)
        self._logprobs = request.logprobs
        self._strip = strip
        self._tokens: list[TokenLogProbs] = []
        self._count = 0
        self._length = 0

    def on_token(self, token: Token) -> bool:
        if self._logprobs is not None:
            self._tokens.append(self._log_probs(token, self._logprobs))
        self._count += 1
        if text := self._stripped(self._text.push(token.id)):
            self._publish(Chunk(self._index, text))
        return not self._text.stopped

    def on_end(self, error: str | None) -> None:
        if error is not None:
            self._publish(Chunk(self._index, error=error))
            return
        rest = self._stripped(self._text.close())
        reason = "stop" if self._text.stopped else "length"
        self._publish(Chunk(self._index, rest, finish_reason=reason))

    def _publish(self, chunk: Chunk) -> None:
        chunk.tokens, count = self._tokens, self._count
        self._tokens, self._count = [], 0
        self._length += len(chunk.text)
        self._streams.publish(chunk, count)

    def _stripped(self, text: str) -> str:
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        return text

    def _log_probs(self, token: Token, count: int) -> TokenLogProbs:
        def text(i: int) -> str:
            return decode_text(self._tokenizer, [i])

        top = zip(token.top_tokens[:count], token.top_log_probs, strict=False)
        return TokenLogProbs(
            text(token.id), token.log_prob, [(text(i), p) for i, p in top], self._length
        )


def _encode(tokenizer: tjx_data.Tokenizer, prompt: Prompt) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    try:
        return tokenizer.encode_prompt(prompt)
    except ValueError as error:
        raise APIError(400, f"the prompt cannot be encoded: {error}", param="prompt") from error
