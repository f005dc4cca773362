"""Access control and request bodies: API key, Host header, size and encoding."""

import asyncio
import hmac
import json
from typing import Any

from starlette.requests import Request

from tjx_data.bounded_io import parse_json
from tjx_eval.serving.errors import APIError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_BODY_SECONDS = 30


def check_access(request: Request, api_key: str | None) -> None:
    """Require the API key, or without one, a Host header that names this machine.

    Raises
    ------
    APIError
        401 or 403.
    """
    check_host(request, api_key)
    if api_key is None:
        return
    given = request.headers.get("authorization", "")
    scheme, _, key = given.partition(" ")
    same = hmac.compare_digest(key.strip().encode(), api_key.encode())
    if scheme.lower() != "bearer" or not same:
        raise APIError(
            401, "the API key is missing or wrong: send Authorization: Bearer KEY",
            code="invalid_api_key",
        )  # fmt: skip


def check_host(request: Request, api_key: str | None) -> None:
    """Require a Host header that names this machine, if the server has no API key.

    A web page can reach the loopback address under its own name (DNS rebinding), which then is in
    the Host header.

    Raises
    ------
    APIError
        403.
    """
    host = request.headers.get("host", "")
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if api_key is None and name.strip("[]").lower() not in LOOPBACK:
        raise APIError(403, f"this server answers on loopback alone, not as {host[:60]!r}")


async def read_json(request: Request, max_bytes: int) -> Any:
    """Read and parse a JSON body of at most `max_bytes` bytes.

    Raises
    ------
    APIError
        408, 413, 415 or 400.
    """
    # HTML forms cannot send this content type without a CORS preflight request.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError(415, f"content-type is {kind[:60]!r}: send application/json")
    claimed = request.headers.get("content-length", "0")
    too_large = APIError(413, f"the body is too large: at most {max_bytes} bytes are accepted")
    if claimed.isdecimal() and int(claimed[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise APIError(408, f"the body did not arrive within {_BODY_SECONDS} s") from error
    try:
        content = parse_json(bytes(body))
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise APIError(400, "the body has half of a surrogate pair (\\ud800)") from error
    except ValueError as error:
        raise APIError(400, f"the body is not valid JSON: {error}") from error
    return content
