"""Who may ask: the key, the host, and how much a request may hold."""

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
    """Refuse who has not the key; without a key, who does not name this machine.

    A page in a browser can reach loopback under a name of its own (DNS rebinding): that name stands
    in the header Host.

    Raises
    ------
    RefusedError
        401 or 403.
    """
    if api_key is None:
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if name.strip("[]").lower() not in LOOPBACK:
            raise APIError(403, f"this server answers on loopback alone, not as {host[:60]!r}")
        return
    given = request.headers.get("authorization", "")
    scheme, _, key = given.partition(" ")
    same = hmac.compare_digest(key.strip().encode(), api_key.encode())
    if scheme.lower() != "bearer" or not same:
        raise APIError(
            401, "the API key is missing or wrong: send Authorization: Bearer KEY",
            code="invalid_api_key",
        )  # fmt: skip


async def read_json(request: Request, most: int) -> Any:
    """Read the body of a request, of at most so many bytes.

    Raises
    ------
    RefusedError
        408, 413, 415 or 400.
    """
    # A form of a browser cannot send this type without asking first.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError(415, f"content-type is {kind[:60]!r}: send application/json")
    claimed = request.headers.get("content-length", "0")
    too_large = APIError(413, f"the body is too large: {most} bytes are taken")
    if claimed.isdecimal() and int(claimed[:20]) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_large
    except TimeoutError as error:
        raise APIError(408, f"the body did not come in {_BODY_SECONDS} s") from error
    try:
        content = parse_json(bytes(body))
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise APIError(400, "the body has half of a surrogate pair (\\ud800)") from error
    except ValueError as error:
        raise APIError(400, f"the body is no JSON: {error}") from error
    return content
