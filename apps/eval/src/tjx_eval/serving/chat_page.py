"""The chat page: three static files that use the API of the same server."""

from importlib.resources import files

from starlette.responses import Response

_TYPES = {"chat.html": "text/html", "chat.css": "text/css", "chat.js": "text/javascript"}
PAGE_FILES = ("chat.css", "chat.js")
# Scripts and connections of this server alone; other pages cannot embed it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def page_response(path: str) -> Response:
    """Return a file of the page; ``/`` is the page itself."""
    name = path.lstrip("/") or "chat.html"
    content = files("tjx_eval.serving").joinpath("page", name).read_bytes()
    return Response(content, headers=_HEADERS, media_type=_TYPES[name])
