"""HTTP errors in the format of the OpenAI API."""

from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_SERVER_ERROR = 500


class APIError(Exception):
    """Raised to reject a request.

    Attributes
    ----------
    status : int
        HTTP status code.
    param : str or None
        The invalid field.
    code : str or None
        Machine-readable error code.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """Return the error as JSON."""
        server = "server_error" if self.status >= _SERVER_ERROR else "invalid_request_error"
        kind = _TYPES.get(self.status, server)
        return {
            "error": {
                "message": str(self), "type": kind, "param": self.param, "code": self.code,
            }
        }  # fmt: skip

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}
        return JSONResponse(self.body(), self.status, headers.get(self.status))


def invalid(name: str, problem: str) -> APIError:
    """Return the error for an invalid field of a request."""
    return APIError(400, f"{name}: {problem}", param=name)
