"""Every error a caller of the HTTP API can meet, as one tree.

    ApiError
    ├── BadRequest            400  a field, a parameter or a body is wrong
    ├── Unauthorized          401  no key, unknown key, revoked key: one indistinguishable answer
    ├── NotFound              404  does not exist, or belongs to somebody else
    ├── MethodNotAllowed      405
    ├── Conflict              409  the object's state forbids it; never worth a retry
    ├── TooLarge              413  an upload over its limit; nothing was stored
    ├── RangeNotSatisfiable   416
    ├── TooManyRequests       429  quota or capacity; says when to come back
    ├── InternalError         500  a defect of the server, never of the caller
    └── Unavailable           503  database or store out of reach or full; says when to come back

An error is raised where it is understood and turned into an HTTP answer in one place (`batchery.server.errors`). The
JSON shape is OpenAI's: `{"error": {"message", "type", "param", "code"}}`, all four keys always present.
"""

from __future__ import annotations

import math
from typing import overload

import msgspec


class ErrorBody(msgspec.Struct, frozen=True):
    """The inner object of an error answer, as OpenAI has it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """An error answer: `{"error": {...}}`."""

    error: ErrorBody


class ApiError(Exception):
    """Something the API answers with an error.

    Args:
        message: names the thing, the reason and the remedy.
        param: the field or parameter that is wrong, as the caller wrote it.
        code: machine-readable cause; the class's default where none is given.
    """

    status: int = 500
    type: str = "server_error"
    default_code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code

    def headers(self) -> dict[str, str]:
        """Headers that the answer must carry besides its body."""
        return {}

    def envelope(self) -> ErrorEnvelope:
        """The JSON answer."""
        return ErrorEnvelope(ErrorBody(_sendable(self.message), self.type, _sendable(self.param), _sendable(self.code)))


@overload
def _sendable(text: str) -> str: ...
@overload
def _sendable(text: str | None) -> str | None: ...
def _sendable(text: str | None) -> str | None:
    """The text as UTF-8 can carry it: a caller's own bytes in it (a lone surrogate) must not turn a 400 into a 500."""
    return None if text is None else text.encode(errors="replace").decode()


class BadRequest(ApiError):
    """400: what was sent is wrong; the message says what would be accepted."""

    status = 400
    type = "invalid_request_error"


class Unauthorized(ApiError):
    """401: one answer for a missing, an unknown and a revoked key."""

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class NotFound(ApiError):
    """404: it does not exist, or it is somebody else's, which must look the same."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class MethodNotAllowed(ApiError):
    """405: the path exists, the method does not."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class Conflict(ApiError):
    """409: the object's state forbids it. Official clients retry 409 unless told not to, so they are told."""

    status = 409
    type = "invalid_request_error"
    default_code = "conflict"

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class TooLarge(ApiError):
    """413: over a size limit; nothing was stored."""

    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class RangeNotSatisfiable(ApiError):
    """416: the range lies outside the file.

    Args:
        size: the file's length in bytes, named in `Content-Range`.
    """

    status = 416
    type = "invalid_request_error"
    default_code = "range_not_satisfiable"

    def __init__(self, message: str, *, size: int) -> None:
        super().__init__(message, param="Range")
        self.size = size

    def headers(self) -> dict[str, str]:
        return {"Content-Range": f"bytes */{self.size}"}


class _Later(ApiError):
    """An error that passes by itself.

    Args:
        retry_after: seconds after which a retry makes sense; sent as a whole number from 1 to 60, rounded up, since
            official clients stop honouring larger values.
    """

    def __init__(
        self, message: str, *, retry_after: float = 5, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after = math.ceil(min(60, max(1, retry_after)))  # in this order NaN is 1

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)}


class TooManyRequests(_Later):
    """429: a quota or the capacity is used up."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class InternalError(ApiError):
    """500: a defect of the server. Its message never carries internals."""

    status = 500
    type = "server_error"
    default_code = "internal_error"


class Unavailable(_Later):
    """503: the database or the store is out of reach, or the disk is full."""

    status = 503
    type = "server_error"
    default_code = "service_unavailable"
