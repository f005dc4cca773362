"""HTTP endpoints of the OpenAI API, backed by an engine."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import tjx_data
from tjx_eval.serving.access import check_access, check_host, read_json
from tjx_eval.serving.chat import ChatPrompts
from tjx_eval.serving.chat_page import PAGE_FILES, page_response
from tjx_eval.serving.engine import Engine
from tjx_eval.serving.errors import APIError
from tjx_eval.serving.requests import CompletionRequest, parse_chat, parse_completion
from tjx_eval.serving.responses import ChatFormat, CompletionFormat, ResponseFormat
from tjx_eval.serving.streaming import Chunk, CompletionStreams, merged

_CLIENT_CLOSED = 499  # de facto status for a client that disconnected


@dataclass(frozen=True)
class Service:
    """A served model, and its access rules.

    Attributes
    ----------
    name : str
        Model name in the API.
    engine : Engine
        Generates the tokens.
    tokenizer : tjx_data.Tokenizer
        The model's tokenizer.
    template : tjx_data.ChatTemplate or None
        Chat template of the model; None for a base model.
    api_key : str or None
        Required key; None accepts all requests from this machine.
    max_body_bytes : int
        Maximum size of a request body.
    """

    name: str
    engine: Engine
    tokenizer: tjx_data.Tokenizer
    template: tjx_data.ChatTemplate | None = None
    api_key: str | None = None
    max_body_bytes: int = 1 << 20

    @cached_property
    def chat_prompts(self) -> ChatPrompts:
        """Converts messages to prompts."""
        return ChatPrompts(self.tokenizer, self.template)

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            *(Route(f"/{file}", self.page) for file in PAGE_FILES),
        ]
        handlers: dict[Any, Any] = {
            APIError: lambda _request, error: error.response(),
            HTTPException: _http_error,
            Exception: _unexpected_error,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, _request: Request) -> Response:
        """Return the engine's status and load; needs no key."""
        state = self.engine.state()
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    async def page(self, request: Request) -> Response:
        """Return a file of the chat page; needs no key, which the page asks for."""
        check_host(request, self.api_key)
        return page_response(request.url.path)

    async def models(self, request: Request) -> Response:
        """Return the model."""
        check_access(request, self.api_key)
        decoder = self.engine.decoder
        model = {
            "id": self.name, "object": "model", "created": 0, "owned_by": "tjx",
            "max_model_len": decoder.max_len,
        }  # fmt: skip
        name = request.path_params.get("model")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != self.name:
            raise APIError(404, f"there is no model {name[:60]!r}", code="model_not_found")
        return JSONResponse(model)

    async def completions(self, request: Request) -> Response:
        """Complete prompts."""

        def make_format(parsed: CompletionRequest) -> ResponseFormat:
            texts = [
                prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
                for prompt in (parsed.prompts if parsed.echo else [])
            ]
            return CompletionFormat(self.name, parsed, texts)

        return await self._respond(request, parse_completion, make_format)

    async def chat(self, request: Request) -> Response:
        """Complete a conversation."""

        def parse(body: Any, model: str) -> CompletionRequest:
            return parse_chat(body, model, self.chat_prompts)

        return await self._respond(
            request, parse, lambda parsed: ChatFormat(self.name, parsed), strip=True
        )

    async def _respond(
        self,
        request: Request,
        parse: Callable[[Any, str], CompletionRequest],
        make_format: Callable[[CompletionRequest], ResponseFormat],
        *,
        strip: bool = False,
    ) -> Response:
        check_access(request, self.api_key)
        body = await read_json(request, self.max_body_bytes)

        def prepare() -> tuple[CompletionRequest, CompletionStreams]:
            parsed = parse(body, self.name)
            return parsed, CompletionStreams(self.engine, self.tokenizer, parsed, strip=strip)

        # In a thread: rendering and encoding a long prompt would block the event loop.
        parsed, streams = await asyncio.to_thread(prepare)
        streams.submit()
        response_format = make_format(parsed)
        if parsed.stream:
            events = _events(request, streams, response_format, parsed.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        async with _cancel_on_disconnect(request, streams):
            chunks = await _collect(streams)
        return JSONResponse(response_format.complete(chunks, _usage(streams)))


async def _collect(streams: CompletionStreams) -> list[Chunk]:
    """Merge the chunks of each completion."""
    completions: dict[int, Chunk] = {}
    async for chunk in streams:
        if chunk.error is not None:
            raise _engine_error(chunk.error)
        completions[chunk.index] = merged(completions.get(chunk.index), chunk)
    return [completions[index] for index in sorted(completions)]


async def _events(
    request: Request,
    streams: CompletionStreams,
    response_format: ResponseFormat,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Yield the response as server-sent events."""
    async with _cancel_on_disconnect(request, streams):
        async for chunk in streams:
            if chunk.error is not None:
                yield _event(_engine_error(chunk.error).body())
                return
            event = response_format.chunk(chunk)
            if event is not None:
                yield _event(event)
        if include_usage:
            yield _event(response_format.usage_chunk(_usage(streams)))
        yield "data: [DONE]\n\n"


@asynccontextmanager
async def _cancel_on_disconnect(
    request: Request, streams: CompletionStreams
) -> AsyncIterator[None]:
    """Cancel the completions if the client disconnects or an error occurs."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        streams.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        streams.cancel()


def _usage(streams: CompletionStreams) -> dict[str, int]:
    prompt, completion = streams.prompt_tokens, streams.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _engine_error(reason: str) -> APIError:
    return APIError(_CLIENT_CLOSED if reason == "cancelled" else 503, reason)


def _http_error(_request: Request, error: HTTPException) -> Response:
    return APIError(error.status_code, error.detail).response()


def _unexpected_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return APIError(_CLIENT_CLOSED, "the client disconnected").response()
    return APIError(500, "internal error; see the server's log").response()
