"""The endpoints: OpenAI's protocol over an engine."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import tjx_data
from tjx_eval.serving.access import check_access, read_json
from tjx_eval.serving.engine import Engine
from tjx_eval.serving.errors import APIError
from tjx_eval.serving.requests import CompletionRequest, read_chat, read_completion
from tjx_eval.serving.responses import ChatForm, CompletionForm, Form
from tjx_eval.serving.streaming import Piece, Writing

_CLOSED = 499  # what proxies call a client that has gone


@dataclass(frozen=True)
class Service:
    """What is served, and to whom.

    Attributes
    ----------
    name : str
        What the model is called.
    engine : Engine
        Who writes.
    tokenizer : tjx_data.Tokenizer
        The model's.
    api_key : str or None
        Who has it may ask; None is everybody on this machine.
    most_bytes : int
        Largest body of a request.
    """

    name: str
    engine: Engine
    tokenizer: tjx_data.Tokenizer
    api_key: str | None = None
    most_bytes: int = 1 << 20

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            APIError: lambda _request, error: error.response(),
            HTTPException: _refused,
            Exception: _failed,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, _request: Request) -> Response:
        """Say whether the engine works, and how busy it is; needs no key."""
        state = self.engine.state()
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    async def models(self, request: Request) -> Response:
        """Name the model."""
        check_access(request, self.api_key)
        decoder = self.engine.decoder
        model = {
            "id": self.name, "object": "model", "created": 0, "owned_by": "tjx",
            "max_model_len": decoder.max_len,
        }  # fmt: skip
        asked = request.path_params.get("model")
        if asked is None:
            return JSONResponse({"object": "list", "data": [model]})
        if asked != self.name:
            raise APIError(404, f"there is no model {asked[:60]!r}", code="model_not_found")
        return JSONResponse(model)

    async def completions(self, request: Request) -> Response:
        """Continue texts."""

        def form(asked: CompletionRequest) -> Form:
            texts = [
                prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
                for prompt in (asked.prompts if asked.echo else [])
            ]
            return CompletionForm(self.name, asked, texts)

        return await self._answer(request, read_completion, form)

    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        return await self._answer(
            request, read_chat, lambda asked: ChatForm(self.name, asked), strips=True
        )

    async def _answer(
        self,
        request: Request,
        read: Callable[[Any, str], CompletionRequest],
        make_form: Callable[[CompletionRequest], Form],
        *,
        strips: bool = False,
    ) -> Response:
        check_access(request, self.api_key)
        asked = read(await read_json(request, self.most_bytes), self.name)
        # A long prompt takes its time to encode, in which others are answered.
        writing = await asyncio.to_thread(
            Writing, self.engine, self.tokenizer, asked, strips=strips
        )
        writing.submit()
        form = make_form(asked)
        if asked.stream:
            events = _events(request, writing, form, asked.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        async with _cancelled_when_gone(request, writing):
            pieces = await _gathered(writing)
        return JSONResponse(form.whole(pieces, _usage(writing)))


async def _gathered(writing: Writing) -> list[Piece]:
    """Return each continuation as one piece."""
    whole: dict[int, Piece] = {}
    async for piece in writing:
        if piece.error is not None:
            raise _ended(piece.error)
        so_far = whole.setdefault(piece.index, Piece(piece.index))
        so_far.text += piece.text
        so_far.tokens += piece.tokens
        so_far.finish_reason = piece.finish_reason
    return [whole[index] for index in sorted(whole)]


async def _events(
    request: Request, writing: Writing, form: Form, include_usage: bool
) -> AsyncIterator[str]:
    """Yield the answer as server-sent events."""
    async with _cancelled_when_gone(request, writing):
        async for piece in writing:
            if piece.error is not None:
                yield _event(_ended(piece.error).body())
                return
            yield _event(form.chunk(piece))
        if include_usage:
            yield _event(form.usage_chunk(_usage(writing)))
        yield "data: [DONE]\n\n"


@asynccontextmanager
async def _cancelled_when_gone(request: Request, writing: Writing) -> AsyncIterator[None]:
    """End what is written when its reader has gone, or was told of an error."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        writing.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        writing.cancel()


def _usage(writing: Writing) -> dict[str, int]:
    read, written = writing.prompt_tokens, writing.completion_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _ended(reason: str) -> APIError:
    return APIError(_CLOSED if reason == "cancelled" else 503, reason)


def _refused(_request: Request, error: HTTPException) -> Response:
    return APIError(error.status_code, error.detail).response()


def _failed(_request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return APIError(_CLOSED, "the client has gone").response()
    return APIError(500, "the server failed; its log says why").response()
