"""From tokens of the engine's thread to pieces of text for one request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import tjx_data
from tjx_eval.serving.engine import Engine, FullError, GenerationRequest, StoppedError, Token
from tjx_eval.serving.errors import APIError
from tjx_eval.serving.requests import CompletionRequest, Prompt
from tjx_trainer.tasks.sampling import encode_prompt
from tjx_trainer.tasks.text_stream import TextStream, decode_text


class TokenLogProbs(NamedTuple):
    """A token as log-probabilities are told of it; `offset` is its place in the text."""

    text: str
    log_prob: float
    top_tokens: list[tuple[str, float]]
    offset: int


@dataclass
class Piece:
    """What is new of one continuation.

    Attributes
    ----------
    index : int
        Which one.
    text : str
        What follows the pieces before.
    tokens : list of TokenText
        Its tokens, where log-probabilities were asked for.
    finish_reason : str or None
        "stop" or "length" with the last piece.
    error : str or None
        Why no more comes, where not all was written.
    """

    index: int
    text: str = ""
    tokens: list[TokenLogProbs] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


class Writing:
    """All continuations that one request asks for; iterate for their pieces as they come.

    Parameters
    ----------
    engine : Engine
        Who writes.
    tokenizer : tjx_data.Tokenizer
        The model's.
    asked : Asked
        The request.
    strips : bool
        Whether white space at the beginning of a continuation is left out.

    Attributes
    ----------
    prompt_tokens, completion_tokens : int
        What was read and written so far, of all continuations.

    Raises
    ------
    RefusedError
        If the request does not fit the model.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: tjx_data.Tokenizer,
        asked: CompletionRequest,
        *,
        strips: bool = False,
    ) -> None:
        self._engine, self._asked = engine, asked
        # Before anything is encoded: thousands of prompts times n would be made to be refused.
        if (count := len(asked.prompts) * asked.n) > engine.most_waiting:
            raise APIError(
                400,
                f"{count} continuations are asked for at once; up to {engine.most_waiting} are "
                "taken",
                param="n",
            )
        prompts = [_encoded(tokenizer, prompt) for prompt in asked.prompts]
        self.prompt_tokens = sum(map(len, prompts))
        self.completion_tokens = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._orders = [
            self._order(tokenizer, i * asked.n + j, prompt, asked.seed + j, strips)
            for i, prompt in enumerate(prompts)
            for j in range(asked.n)
        ]

    def submit(self) -> None:
        """Put the continuations in line; in the event loop that reads them.

        Raises
        ------
        RefusedError
            If the request does not fit, or there is no room for it.
        """
        self._loop = asyncio.get_running_loop()
        try:
            self._engine.submit(self._orders)
        except ValueError as error:
            raise APIError(400, "; ".join(str(error).splitlines())) from error
        except FullError as error:
            raise APIError(429, str(error), code="too_many_requests") from error
        except StoppedError as error:
            raise APIError(503, str(error)) from error

    def cancel(self) -> None:
        """Nobody reads any more: end what is not over."""
        self._engine.cancel(self._orders)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield pieces until every continuation has ended."""
        running = len(self._orders)
        while running:
            piece = await self._pieces.get()
            running -= piece.finish_reason is not None or piece.error is not None
            yield piece

    def _order(
        self, tokenizer: tjx_data.Tokenizer, index: int, prompt: list[int], seed: int, strips: bool
    ) -> GenerationRequest:
        asked = self._asked
        room = self._engine.decoder.max_len - len(prompt)
        new = room if asked.max_tokens is None else asked.max_tokens
        if new > room or room < 1:
            raise APIError(
                400,
                f"this model's context is {self._engine.decoder.max_len} tokens; the prompt has "
                f"{len(prompt)} and {max(new, 1)} new ones are asked for: give a shorter prompt "
                "or fewer tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        line = _Line(self, tokenizer, index, asked, strips)
        options = asked.options.copy()
        options["seed"] = seed % 2**32
        if options.get("top_k") is not None:
            options["top_k"] = min(options["top_k"] or 1, self._engine.decoder.config.vocab_size)
        return GenerationRequest(prompt, new, options, line.take, line.end)

    def give(self, piece: Piece, tokens: int) -> None:
        """Hand a piece over to the event loop; from any thread."""
        assert self._loop is not None

        def take() -> None:
            self.completion_tokens += tokens
            self._pieces.put_nowait(piece)

        with suppress(RuntimeError):  # the loop is closed: nobody reads
            self._loop.call_soon_threadsafe(take)


class _Line:
    """One continuation on the engine's thread."""

    def __init__(
        self,
        writing: Writing,
        tokenizer: tjx_data.Tokenizer,
        index: int,
        asked: CompletionRequest,
        strips: bool,
    ) -> None:
        self._writing, self._tokenizer, self._index = writing, tokenizer, index
        self._text = TextStream(tokenizer, asked.stops, ends_with_document=True)
        self._logprobs = asked.logprobs
        self._strips = strips
        self._tokens: list[TokenLogProbs] = []
        self._count = 0
        self._length = 0

    def take(self, token: Token) -> bool:
        if self._logprobs is not None:
            self._tokens.append(self._told(token, self._logprobs))
        self._count += 1
        piece = self._stripped(self._text.push(token.id))
        if piece:
            self._give(Piece(self._index, piece))
        return not self._text.stopped

    def end(self, reason: str | None) -> None:
        if reason is not None:
            self._give(Piece(self._index, error=reason))
            return
        rest = self._stripped(self._text.close())
        finish = "stop" if self._text.stopped else "length"
        self._give(Piece(self._index, rest, finish_reason=finish))

    def _give(self, piece: Piece) -> None:
        piece.tokens, count = self._tokens, self._count
        self._tokens, self._count = [], 0
        self._length += len(piece.text)
        self._writing.give(piece, count)

    def _stripped(self, text: str) -> str:
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return text

    def _told(self, token: Token, count: int) -> TokenLogProbs:
        def text(i: int) -> str:
            return decode_text(self._tokenizer, [i])

        top_tokens = zip(token.top_tokens[:count], token.top_log_probs, strict=False)
        return TokenLogProbs(
            text(token.id), token.log_prob, [(text(i), p) for i, p in top_tokens], self._length
        )


def _encoded(tokenizer: tjx_data.Tokenizer, prompt: Prompt) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    try:
        return encode_prompt(tokenizer, prompt)
    except ValueError as error:
        raise APIError(400, f"the prompt cannot be read: {error}", param="prompt") from error
